package ws

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// The ends of reading, as this package and gorilla report them.
const (
	endLost     = "connection lost"
	endProtocol = "protocol error" // close code 1002
	endTooBig   = "too big"        // close code 1009
)

func endOf(err error) string {
	var (
		closed *websocket.CloseError
		framed *Error
	)
	switch {
	case errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure:
		return closeEnd(closed.Code, closed.Text)
	case closed != nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return endLost
	case errors.Is(err, websocket.ErrReadLimit), errors.As(err, &framed) && framed.Code == websocket.CloseMessageTooBig:
		return endTooBig
	default:
		return endProtocol
	}
}

func closeEnd(code int, reason string) string { return fmt.Sprintf("closed with %d %q", code, reason) }

// read is what a reader returned for a tape, in order: a message, or a ping.
type read struct {
	kind string
	data string // of a message that was discarded only its head
	size int
}

// readHere reads messages with this package until the end. Each is read in the way that
// comes next.
func readHere(t *testing.T, conn net.Conn, dialled bool, next func() way) (all []read, end string) {
	c := New(conn, dialled)
	c.Start(func(data []byte) { all = append(all, read{"ping", string(data), len(data)}) }, func(int, bool) {})
	for {
		w := next()
		message, err := w.read(c)
		if err != nil {
			return all, endOf(err)
		}
		require.True(t, c.Final())
		require.Zero(t, c.Left())
		if !w.discards {
			require.Len(t, message, c.Size())
		}
		kind := "binary"
		if c.Text() {
			kind = "text"
		}
		all = append(all, read{kind, string(message), c.Size()})
	}
}

// way is one of those in which sessions read a message.
type way struct {
	memory   int // bytes of memory that there are for it
	head     int // of its bytes, read before the rest
	discards bool
}

func (w way) read(c *Conn) (message []byte, err error) {
	if err = c.Next(); err != nil {
		return nil, err
	}
	if message, err = c.ReadHead(make([]byte, 0, w.memory), w.head); err != nil {
		return nil, err
	}
	if w.discards {
		return message, c.Discard()
	}
	return readRest(c, message)
}

// readRest reads the rest of a message, in parts of as much as there is memory for.
func readRest(c *Conn, message []byte) ([]byte, error) {
	for {
		for c.Left() > 0 {
			if len(message) == cap(message) {
				message = slices.Grow(message, 4096)
			}
			part := message[len(message):min(cap(message), len(message)+c.Left())]
			if err := c.ReadFull(part); err != nil {
				return nil, err
			}
			message = message[:len(message)+len(part)]
		}
		if c.Final() {
			return message, nil
		}
		if err := c.NextFragment(); err != nil {
			return nil, err
		}
	}
}

// ways are drawn from seed.
func ways(seed uint64) func() way {
	draw := rand.New(rand.NewPCG(seed, 1))
	return func() way {
		return way{draw.IntN(2) * draw.IntN(5000), draw.IntN(2) << draw.IntN(20), draw.IntN(4) == 0}
	}
}

// requireReads wants a reader to have returned all of this, but for the rest of what it
// has discarded.
func requireReads(t *testing.T, want, got []read) {
	t.Helper()
	require.Len(t, got, len(want))
	for i, r := range want {
		require.Equal(t, r.kind, got[i].kind)
		require.Equal(t, r.size, got[i].size)
		require.True(t, strings.HasPrefix(r.data, got[i].data), "another payload of number %d", i)
	}
}

// pieces are the sizes of what arrives at once: each a byte if seed is 0.
func pieces(seed uint64) func() int {
	draw := rand.New(rand.NewPCG(seed, 2))
	return func() int {
		if seed == 0 {
			return 1
		}
		return 1 + draw.IntN(1<<draw.IntN(18))
	}
}

// readByGorilla reads a tape with gorilla's server, or with its client if dialled.
// reason is the text of the error at the end.
func readByGorilla(t *testing.T, tape []byte, dialled bool, seed uint64) (all []read, end, reason string) {
	conn := &tapeConn{tape: tape, piece: pieces(seed)}
	ws := gorillaServer
	if dialled {
		ws = gorillaClient
	}
	c, err := ws(conn)
	require.NoError(t, err)
	c.SetReadLimit(MaxMessage)
	c.SetPingHandler(func(data string) error {
		all = append(all, read{"ping", data, len(data)})
		return nil
	})
	for {
		typ, message, err := c.ReadMessage()
		if err != nil {
			return all, endOf(err), err.Error()
		}
		kind := "binary"
		if typ == websocket.TextMessage {
			kind = "text"
		}
		all = append(all, read{kind, string(message), len(message)})
	}
}

// hijacked passes a tape to gorilla's server.
type hijacked struct {
	http.ResponseWriter
	conn net.Conn
}

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(bufio.NewReader(h.conn), bufio.NewWriter(h.conn)), nil
}

func gorillaServer(conn *tapeConn) (*websocket.Conn, error) {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	r.Header = http.Header{
		"Upgrade": {"websocket"}, "Connection": {"upgrade"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"MDEyMzQ1Njc4OWFiY2RlZg=="},
	}
	return (&websocket.Upgrader{}).Upgrade(hijacked{httptest.NewRecorder(), conn}, r, nil)
}

// answering upgrades gorilla's client, and passes a tape to it.
type answering struct {
	*tapeConn
	answer []byte
}

func (c *answering) Read(p []byte) (int, error) {
	if c.answer == nil {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(string(c.taken))))
		if err != nil {
			return 0, err
		}
		accept := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		c.answer = []byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
			"Sec-WebSocket-Accept: " + base64.StdEncoding.EncodeToString(accept[:]) + "\r\n\r\n")
	}
	if len(c.answer) > 0 {
		n := copy(p, c.answer)
		c.answer = c.answer[n:]
		return n, nil
	}
	return c.tapeConn.Read(p)
}

func gorillaClient(conn *tapeConn) (*websocket.Conn, error) {
	dialer := websocket.Dialer{NetDialContext: func(context.Context, string, string) (net.Conn, error) {
		return &answering{tapeConn: conn}, nil
	}}
	c, _, err := dialer.Dial("ws://peer/", nil) //nolint:bodyclose // there is none
	return c, err
}

// wantEnd is how reading must end where gorilla ends so. It differs by intent, and
// only here, in two points of RFC 6455, 7.4 and 5.5.1, that gorilla leaves open.
func wantEnd(tape []byte, end, reason string) string {
	switch {
	case end == closeEnd(websocket.CloseNoStatusReceived, "") && len(closePayload(tape)) == 1:
		return endProtocol // one byte is no code
	case end == endProtocol && strings.HasSuffix(reason, "bad close code 1014"):
		if text := closePayload(tape)[2:]; utf8.Valid(text) {
			return closeEnd(1014, string(text)) // registered by IANA
		}
	}
	return end
}

// closePayload returns the payload of the first close frame of a tape, which is valid
// up to its end.
func closePayload(tape []byte) []byte {
	for {
		head, masked, size := 2, tape[1]&0x80 != 0, uint64(tape[1]&0x7F)
		switch size {
		case 126:
			head, size = 4, uint64(binary.BigEndian.Uint16(tape[2:]))
		case 127:
			head, size = 10, binary.BigEndian.Uint64(tape[2:])
		}
		key := make([]byte, 4)
		if masked {
			head += copy(key, tape[head:])
		}
		payload := append([]byte{}, tape[head:head+int(size)]...)
		if tape[0]&0x0F == 8 {
			for i := range payload {
				payload[i] ^= key[i%4]
			}
			return payload
		}
		tape = tape[head+int(size):]
	}
}

// frame is one on the wire, valid or not.
type frame struct {
	first   byte // FIN, the reserved bits and the opcode
	payload []byte
	form    byte
}

// Forms of a frame's length and mask.
const (
	formMinimal   = iota
	form16        // two bytes of length, needed or not
	form64        // eight bytes of length, needed or not
	formLimit     // the length is that of the largest message, less the payload's
	formTopBit    // the length's highest bit is set
	formOtherMask // masked where it must not be, or not where it must be
)

func (f frame) appendTo(tape []byte, masked bool) []byte {
	if f.form == formOtherMask {
		masked = !masked
	}
	size := uint64(len(f.payload))
	if f.form == formLimit {
		size = MaxMessage - size
	}
	var second byte
	if masked {
		second = 0x80
	}
	switch {
	case f.form == formTopBit:
		tape = binary.BigEndian.AppendUint64(append(tape, f.first, second|127), 1<<63|size)
	case f.form == form64, size > 0xFFFF:
		tape = binary.BigEndian.AppendUint64(append(tape, f.first, second|127), size)
	case f.form == form16, size > 125:
		tape = binary.BigEndian.AppendUint16(append(tape, f.first, second|126), uint16(size))
	default:
		tape = append(tape, f.first, second|byte(size))
	}
	if !masked {
		return append(tape, f.payload...)
	}
	key := binary.BigEndian.AppendUint32(nil, uint32(len(tape))*0x9E3779B9+0x01020304)
	tape = append(tape, key...)
	for i, b := range f.payload {
		tape = append(tape, b^key[i%4])
	}
	return tape
}

// A script is a tape in short: four bytes for each frame. Most scripts are nearly
// valid, so that a fuzzer gets far.
//
//	kind:  its low half is the opcode, from a table; bit 4 is "more fragments"
//	form:  what is odd about the head
//	class: the class of the size, or the close code
//	size:  within its class
type step struct{ kind, form, class, size byte }

var (
	opcodes         = [16]byte{0, 1, 2, 8, 9, 10, 0, 0, 0, 1, 1, 2, 2, 9, 9, 10}
	reservedOpcodes = [10]byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15}
	closeCodes      = [16]uint16{1000, 1001, 1002, 1003, 1004, 1005, 1006, 1012, 1013, 1014, 1015, 1016, 2999, 3000, 4999, 5000}
)

// Kinds of steps: the opcodes are indexes.
const (
	more    = 0x10
	cont    = 0
	text    = 1
	bin     = 2
	closing = 3
	pinging = 4
	ponging = 5
)

// Forms of steps, behind those of frames.
const (
	formRSV      = formOtherMask + 1 + iota // one of the reserved bits is set, by the class
	formReserved                            // an opcode without meaning, by the class
	forms

	tapeBytes = 1 << 20 // where a tape ends at the latest, or little later
)

func tapeOf(script []byte, masked bool) (tape []byte) {
	for len(script) >= 4 && len(tape) < tapeBytes {
		tape = step{script[0], script[1], script[2], script[3]}.frame().appendTo(tape, masked)
		script = script[4:]
	}
	return tape
}

func (s step) frame() frame {
	f := frame{first: opcodes[s.kind&0x0F], form: s.form % forms}
	f.payload = s.payload(f.first)
	if s.kind&more == 0 {
		f.first |= 0x80
	}
	switch f.form {
	case formRSV:
		f.first |= 0x40 >> (s.class % 3)
	case formReserved:
		f.first = f.first&0xF0 | reservedOpcodes[s.class%10]
	}
	return f
}

func (s step) payload(op byte) []byte {
	size := int(s.size & 0x7F)
	switch {
	case op == websocket.CloseMessage:
		// The reason is cut in the middle of a character, or not.
		b := binary.BigEndian.AppendUint16(nil, closeCodes[s.class%16])
		return append(b, strings.Repeat("é", 63)...)[:size]
	case op > websocket.CloseMessage: // at most 127 bytes
	case s.class >= 0xC0: // up to 300 KB
		size = (int(s.class&0x3F)<<8 | int(s.size)) * 300_000 >> 14
	case s.class >= 0x80: // around the bounds of the forms of lengths
		size = []int{125, 126, 127, 65535, 65536, 16384, 131072, 4096}[s.size%8]
	}
	return pattern(size)
}

// pattern is a payload in which a part that is missing, or twice, shows.
func pattern(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16 ^ size)
	}
	return b
}

func scriptOf(steps ...step) (script []byte) {
	for _, s := range steps {
		script = append(script, s.kind, s.form, s.class, s.size)
	}
	return script
}

// Messages, pings and the end, with its code and reason, are those that gorilla's reader
// returns in the same role, except for what wantEnd lists.
func FuzzReadMatchesGorilla(f *testing.F) {
	seed := func(steps ...step) {
		for _, dialled := range []bool{false, true} {
			for draw := range uint64(3) {
				f.Add(scriptOf(steps...), false, dialled, draw)
			}
		}
	}
	closes := step{closing, 0, 0, 10}
	// Sizes, forms of lengths, fragments.
	for op := range byte(3) {
		for bound := range byte(8) {
			seed(step{op, 0, 0x80, bound}, step{op, 0, 0x80, bound}, closes)
		}
		seed(step{op, form16, 0, 5}, step{op, form64, 0, 5}, step{op, form64, 0x80, 3}, closes)
	}
	seed(step{text | more, 0, 0, 5}, step{pinging, 0, 0, 4}, step{cont | more, 0, 0, 0}, step{ponging, 0, 0, 3}, step{cont | more, 0, 0x80, 4},
		step{pinging, 0, 0, 125}, step{cont, 0, 0, 9}, step{bin | more, 0, 0, 3}, step{cont, 0, 0xC1, 9}, step{text, 0, 0, 1}, closes)
	seed(step{bin, 0, 0xFF, 0xFF}, step{bin, 0, 0, 0}, step{bin | more, 0, 0xC3, 1}, step{cont | more, 0, 0xC5, 2}, step{cont, 0, 0xC7, 3}, closes)
	seed(step{text, 0, 0, 7}) // and nothing more
	// What is out of turn.
	seed(step{bin | more, 0, 0, 5}, step{bin, 0, 0, 5}, closes)
	seed(step{bin | more, 0, 0, 5}, step{text, 0, 0, 5}, closes)
	seed(step{bin, 0, 0, 5}, step{cont, 0, 0, 5}, closes)
	seed(step{bin | more, 0, 0, 5}, step{cont, 0, 0, 5}, step{cont, 0, 0, 5}, closes)
	seed(step{bin | more, 0, 0, 5}, closes)
	// Odd heads.
	for form := range byte(forms) {
		for _, kind := range []byte{bin, pinging, closing} {
			for class := range byte(10) {
				seed(step{text, 0, 0, 5}, step{kind, form, class, 4}, closes)
			}
		}
	}
	// Control frames.
	for _, kind := range []byte{closing, pinging, ponging} {
		seed(step{kind | more, 0, 0, 5}, closes)
		for size := range byte(128) {
			if size < 8 || size > 122 {
				seed(step{kind, 0, 0, size}, closes)
			}
		}
		seed(step{kind, form16, 0, 5}, closes)
		seed(step{kind, form64, 0, 5}, closes)
	}
	for code := range byte(16) {
		seed(step{text, 0, 0, 1}, step{closing, 0, code, 12})
		seed(step{text, 0, 0, 1}, step{closing, 0, code, 13})
	}
	// The largest message, in one frame and in fragments.
	seed(step{bin | more, 0, 0, 5}, step{cont, formLimit, 0, 4}, step{cont, 0, 0xFF, 0}, closes)
	seed(step{bin | more, 0, 0, 5}, step{cont, formLimit, 0, 5}, closes)
	seed(step{bin, 0, 0, 5}, step{bin, formLimit, 0, 4}, closes)

	f.Add([]byte{0x82, 0xFF, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}, true, false, uint64(3))
	f.Add([]byte{0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8}, true, false, uint64(0))
	f.Add([]byte{0x8A, 0xFE, 0, 1}, true, false, uint64(1))

	f.Fuzz(func(t *testing.T, script []byte, raw, dialled bool, seed uint64) {
		tape := script
		if !raw {
			tape = tapeOf(script, !dialled)
		}
		here, end := readHere(t, &tapeConn{tape: tape, piece: pieces(seed)}, dialled, ways(seed))
		there, endThere, reason := readByGorilla(t, tape, dialled, seed)
		requireReads(t, there, here)
		if end == endTooBig && endThere == endLost {
			// Lengths are checked here before the mask's key has come, and there after it.
			_, endThere, reason = readByGorilla(t, append(tape, 0, 0, 0, 0), dialled, seed)
		}
		require.Equal(t, wantEnd(tape, endThere, reason), end)
	})
}
