package ws

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// First bytes of frames.
const (
	fin      = 0x80
	opCont   = 0x0
	opText   = 0x1
	opBinary = 0x2
	opClose  = 0x8
	opPing   = 0x9
	opPong   = 0xA
)

// rule is one of RFC 6455 about framing: what a peer sends, and what is read.
type rule struct {
	section string
	name    string
	sends   []frame
	reads   []read
	end     string // empty is endLost: the peer ends the connection behind its frames
}

func frameOf(first byte, payload string) frame { return frame{first: first, payload: []byte(payload)} }

func binaryRead(payload string) read { return read{"binary", payload, len(payload)} }

func pingRead(payload string) read { return read{"ping", payload, len(payload)} }

func closeFrame(code uint16, reason string) frame {
	return frame{first: fin | opClose, payload: append(binary.BigEndian.AppendUint16(nil, code), reason...)}
}

func rules() (all []rule) {
	hello := frameOf(fin|opText, "Hello")
	helloRead := read{"text", "Hello", 5}

	for _, size := range []int{0, 1, 125, 126, 127, 65535, 65536, 300_000} {
		payload := string(pattern(size))
		all = append(all, rule{"5.2", fmt.Sprintf("a payload of %d bytes", size), []frame{frameOf(fin|opBinary, payload), hello}, []read{binaryRead(payload), helloRead}, ""})
	}
	all = append(
		all,
		rule{"5.6", "text and binary", []frame{hello, frameOf(fin|opBinary, "Hello")}, []read{helloRead, binaryRead("Hello")}, ""},
		// The minimal number of bytes MUST be used. gorilla accepts more, and so does this package.
		rule{"5.2", "a small length in two bytes", []frame{{fin | opText, []byte("Hello"), form16}, hello}, []read{helloRead, helloRead}, ""},
		rule{"5.2", "a small length in eight bytes", []frame{{fin | opText, []byte("Hello"), form64}, hello}, []read{helloRead, helloRead}, ""},
		rule{"5.2", "the length's highest bit", []frame{hello, {fin | opBinary, nil, formTopBit}}, []read{helloRead}, endTooBig},
		rule{"5.1", "masked by the server, or not masked by the client", []frame{hello, {fin | opText, []byte("Hello"), formOtherMask}}, []read{helloRead}, endProtocol},
		rule{"5.1", "a control frame masked by the server, or not masked by the client", []frame{hello, {fin | opPing, []byte("?"), formOtherMask}}, []read{helloRead}, endProtocol},
	)
	for _, bit := range []byte{0x40, 0x20, 0x10, 0x70} {
		for _, op := range []byte{opText, opBinary, opClose, opPing, opPong} {
			all = append(all, rule{"5.2", fmt.Sprintf("reserved bits %#x of opcode %#x", bit, op), []frame{hello, frameOf(fin|bit|op, "")}, []read{helloRead}, endProtocol})
		}
		all = append(all, rule{"5.2", fmt.Sprintf("reserved bits %#x of a continuation", bit), []frame{frameOf(opText, "Hel"), frameOf(fin|bit|opCont, "lo")}, nil, endProtocol})
	}
	for _, op := range []byte{3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF} {
		all = append(
			all,
			rule{"5.2", fmt.Sprintf("reserved opcode %#x", op), []frame{hello, frameOf(fin|op, "x")}, []read{helloRead}, endProtocol},
			rule{"5.2", fmt.Sprintf("reserved opcode %#x within a message", op), []frame{frameOf(opText, "Hel"), frameOf(fin|op, "lo")}, nil, endProtocol},
		)
	}
	return append(append(append(all, fragmentation()...), controlFrames()...), closing7()...)
}

func fragmentation() []rule {
	hello := frameOf(fin|opText, "Hello")
	helloRead := read{"text", "Hello", 5}
	return []rule{
		{"5.4", "two fragments", []frame{frameOf(opText, "Hel"), frameOf(fin|opCont, "lo"), hello}, []read{helloRead, helloRead}, ""},
		{"5.4", "the kind is the first fragment's", []frame{frameOf(opText, "Hel"), frameOf(fin|opCont, "lo"), frameOf(opBinary, "a"), frameOf(opCont, "b"), frameOf(fin|opCont, "c")}, []read{helloRead, binaryRead("abc")}, ""},
		{"5.4", "empty fragments", []frame{frameOf(opText, ""), frameOf(opCont, ""), frameOf(opCont, "Hello"), frameOf(opCont, ""), frameOf(fin|opCont, ""), hello}, []read{helloRead, helloRead}, ""},
		{"5.4", "empty fragments alone", []frame{frameOf(opBinary, ""), frameOf(opCont, ""), frameOf(fin|opCont, ""), hello}, []read{binaryRead(""), helloRead}, ""},
		{
			"5.4", "control frames between fragments",
			[]frame{frameOf(opText, "H"), frameOf(fin|opPing, "1"), frameOf(opCont, "el"), frameOf(fin|opPong, "?"), frameOf(fin|opPing, ""), frameOf(opCont, ""), frameOf(fin|opPing, "2"), frameOf(fin|opCont, "lo"), hello},
			[]read{pingRead("1"), pingRead(""), pingRead("2"), helloRead, helloRead},
			"",
		},
		{"5.4", "a close frame between fragments", []frame{frameOf(opText, "Hel"), closeFrame(1001, "bye"), frameOf(fin|opCont, "lo")}, nil, closeEnd(1001, "bye")},
		{"5.4", "large fragments", []frame{frameOf(opBinary, string(pattern(70_000))), frameOf(opCont, string(pattern(200_000))), frameOf(fin|opCont, string(pattern(126)))}, []read{binaryRead(string(pattern(70_000)) + string(pattern(200_000)) + string(pattern(126)))}, ""},
		{"5.4", "a continuation of nothing", []frame{frameOf(fin|opCont, "lo")}, nil, endProtocol},
		{"5.4", "a first fragment of nothing", []frame{frameOf(opCont, "lo")}, nil, endProtocol},
		{"5.4", "a continuation behind the last fragment", []frame{frameOf(opText, "Hel"), frameOf(fin|opCont, "lo"), frameOf(fin|opCont, "!")}, []read{helloRead}, endProtocol},
		{"5.4", "text within a message", []frame{frameOf(opText, "Hel"), frameOf(fin|opText, "lo")}, nil, endProtocol},
		{"5.4", "binary within a message", []frame{frameOf(opBinary, "Hel"), frameOf(fin|opBinary, "lo")}, nil, endProtocol},
		{"5.4", "a first fragment within a message", []frame{frameOf(opBinary, "Hel"), frameOf(opBinary, "lo")}, nil, endProtocol},
		{"5.4", "the connection lost between fragments", []frame{hello, frameOf(opText, "Hel")}, []read{helloRead}, endLost},

		{"10.4", "16 MiB in small fragments", inFragments(16<<20, 125), []read{{"binary", strings.Repeat(string(pattern(125)), 16<<20/125+1)[:16<<20], 16 << 20}}, ""},
		{"10.4", "the largest message in fragments", inFragments(MaxMessage, 60_000), []read{{"binary", strings.Repeat(string(pattern(60_000)), MaxMessage/60_000+1)[:MaxMessage], MaxMessage}}, ""},
		{"10.4", "a message over the limit in fragments", inFragments(MaxMessage+1, 60_000), nil, endTooBig},
		{"10.4", "a fragment over the limit", []frame{frameOf(opBinary, "Hel"), {opCont, []byte("l"), formLimit}}, nil, endTooBig},
		{"10.4", "a frame over the limit", []frame{hello, {fin | opBinary, nil, form64}, frameOf(fin|opBinary, string(make([]byte, MaxMessage+1)))}, []read{helloRead, binaryRead("")}, endTooBig},
	}
}

// inFragments returns a message of so many bytes.
func inFragments(size, fragment int) (frames []frame) {
	first := byte(opBinary)
	for ; size > fragment; size -= fragment {
		frames = append(frames, frame{first: first, payload: pattern(fragment)})
		first = opCont
	}
	return append(frames, frame{first: fin | first, payload: pattern(fragment)[:size]})
}

func controlFrames() (all []rule) {
	hello := frameOf(fin|opText, "Hello")
	helloRead := read{"text", "Hello", 5}
	long := string(pattern(125))
	for op, name := range map[byte]string{opClose: "close frame", opPing: "ping", opPong: "pong"} {
		all = append(
			all,
			rule{"5.5", "a fragmented " + name, []frame{hello, frameOf(op, ""), frameOf(fin|opCont, "")}, []read{helloRead}, endProtocol},
			rule{"5.5", "a " + name + " of 126 bytes", []frame{hello, frameOf(fin|op, string(pattern(126)))}, []read{helloRead}, endProtocol},
			rule{"5.5", "a " + name + " of 65536 bytes", []frame{hello, frameOf(fin|op, string(pattern(65536)))}, []read{helloRead}, endProtocol},
			// As no control frame is longer than 125 bytes, none needs more than seven bits.
			rule{"5.5", "a " + name + " with its length in two bytes", []frame{hello, {fin | op, nil, form16}}, []read{helloRead}, endProtocol},
			rule{"5.5", "a " + name + " with its length in eight bytes", []frame{hello, {fin | op, nil, form64}}, []read{helloRead}, endProtocol},
		)
	}
	return append(
		all,
		rule{"5.5.2", "pings", []frame{frameOf(fin|opPing, ""), frameOf(fin|opPing, "a"), frameOf(fin|opPing, long), hello}, []read{pingRead(""), pingRead("a"), pingRead(long), helloRead}, ""},
		rule{"5.5.2", "a ping whose data is no text", []frame{frameOf(fin|opPing, "\xff\x00")}, []read{pingRead("\xff\x00")}, ""},
		rule{"5.5.3", "pongs that nobody asked for", []frame{frameOf(fin|opPong, ""), frameOf(fin|opPong, long), hello}, []read{helloRead}, ""},
	)
}

func closing7() (all []rule) {
	hello := frameOf(fin|opText, "Hello")
	helloRead := read{"text", "Hello", 5}
	closes := func(section, name string, f frame, end string) {
		all = append(all, rule{section, name, []frame{hello, f, hello}, []read{helloRead}, end})
	}
	closes("5.5.1", "a close frame without payload", frameOf(fin|opClose, ""), closeEnd(websocket.CloseNoStatusReceived, ""))
	closes("5.5.1", "a close frame of one byte", frameOf(fin|opClose, "\x03"), endProtocol)
	for _, code := range []uint16{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999} {
		closes("7.4", fmt.Sprintf("close code %d", code), closeFrame(code, ""), closeEnd(int(code), ""))
	}
	for _, code := range []uint16{1012, 1013, 1014} {
		closes("11.7", fmt.Sprintf("close code %d, registered since", code), closeFrame(code, ""), closeEnd(int(code), ""))
	}
	for _, code := range []uint16{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535} {
		closes("7.4", fmt.Sprintf("close code %d", code), closeFrame(code, ""), endProtocol)
	}
	for _, reason := range []string{"bye", "\x00", "κόσμε", "\U0010ffff", strings.Repeat("é", 61), strings.Repeat("x", 123)} {
		closes("7.1.6", fmt.Sprintf("the reason %+q", reason), closeFrame(1000, reason), closeEnd(1000, reason))
	}
	for _, reason := range []string{"\xff", "\xc3", "\x80", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xce\xbax\xed", strings.Repeat("x", 122) + "\xc3"} {
		closes("8.1", fmt.Sprintf("the reason %+q, which is no UTF-8", reason), closeFrame(1000, reason), endProtocol)
	}
	return all
}

// overTCP connects this package with a peer that knows no WebSocket.
func overTCP(t *testing.T) (here net.Conn, peer *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	dialled, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	accepted, err := l.Accept()
	require.NoError(t, err)
	for _, c := range []net.Conn{dialled, accepted} {
		require.NoError(t, c.SetDeadline(time.Now().Add(time.Minute)))
		t.Cleanup(func() { _ = c.Close() })
	}
	return accepted, dialled.(*net.TCPConn)
}

// inBothRoles runs a test as the end that has dialled, and as the one that has accepted.
func inBothRoles(t *testing.T, test func(t *testing.T, dialled bool)) {
	t.Run("dialled", func(t *testing.T) { test(t, true) })
	t.Run("accepted", func(t *testing.T) { test(t, false) })
}

// send writes a tape at once, or its first and last bytes singly.
func send(peer net.Conn, tape []byte, singly bool) {
	const most = 300
	for n, rest := 0, tape; len(rest) > 0; rest = rest[n:] {
		switch sent := len(tape) - len(rest); {
		case !singly:
			n = len(rest)
		case sent < most || len(rest) <= most:
			n = 1
		default:
			n = len(rest) - most
		}
		if _, err := peer.Write(rest[:n]); err != nil {
			return // the reader has found its end
		}
	}
}

func TestReadingFollowsRFC6455(t *testing.T) {
	for _, rule := range rules() {
		t.Run(rule.section+" "+rule.name, func(t *testing.T) {
			inBothRoles(t, func(t *testing.T, dialled bool) {
				var tape []byte
				for _, f := range rule.sends {
					tape = f.appendTo(tape, !dialled)
				}
				want := rule.end
				if want == "" {
					want = endLost
				}
				ways := []way{{memory: 4096, head: 3}, {discards: true}, {}, {head: 1 << 30}, {head: 3, discards: true}}
				if len(tape) > 1<<20 {
					ways = ways[:2] // the others take long
				}
				for _, w := range ways {
					for _, singly := range []bool{false, true} {
						here, peer := overTCP(t)
						var sending sync.WaitGroup
						sending.Go(func() {
							send(peer, tape, singly)
							_ = peer.CloseWrite()
						})
						got, end := readHere(t, here, dialled, func() way { return w })
						require.NoError(t, here.Close())
						sending.Wait()
						require.Equal(t, want, end)
						requireReads(t, rule.reads, got)
					}
				}
			})
		})
	}
}

// RFC 6455, 5.2: one frame a message, no reserved bits, the shortest form of its length.
// 5.1 and 5.3: the end that has dialled masks, with a new key each time, and the other
// doesn't.
func TestWritingFollowsRFC6455(t *testing.T) {
	const longest = 16 << 20
	sizes := []int{0, 1, 125, 126, 127, 65535, 65536, WriteDirect - 1, WriteDirect, longest}
	inBothRoles(t, func(t *testing.T, dialled bool) {
		here, peer := overTCP(t)
		write := func() error {
			c := New(here, dialled)
			for _, op := range []int{websocket.BinaryMessage, websocket.PingMessage, websocket.PongMessage, websocket.CloseMessage} {
				for _, size := range sizes {
					if size > maxControl && op != websocket.BinaryMessage {
						break
					}
					head := min(size/3, 21) // the parts of a message are one frame
					payload := pattern(size)
					if err := c.Write(op, payload[:head], payload[head:]); err != nil {
						return err
					}
				}
			}
			return errors.Join(c.Flush(), c.CloseWrite())
		}
		written := make(chan error, 1)
		go func() { written <- write() }()

		in := bufio.NewReader(peer)
		next := func(n int) []byte {
			b := make([]byte, n)
			_, err := io.ReadFull(in, b)
			require.NoError(t, err)
			return b
		}
		keys := map[string]bool{}
		frames := 0
		for _, op := range []byte{opBinary, opPing, opPong, opClose} {
			for _, size := range sizes {
				if size > maxControl && op != opBinary {
					break
				}
				head := next(2)
				require.Equal(t, fin|op, head[0], "FIN, no reserved bit, the opcode")
				require.Equal(t, dialled, head[1]&0x80 != 0, "masked")
				switch length := int(head[1] & 0x7F); {
				case size <= 125:
					require.Equal(t, size, length)
				case size <= 65535:
					require.Equal(t, 126, length)
					require.Equal(t, size, int(binary.BigEndian.Uint16(next(2))))
				default:
					require.Equal(t, 127, length)
					require.Equal(t, uint64(size), binary.BigEndian.Uint64(next(8)))
				}
				var key []byte
				if dialled {
					key = next(4)
					keys[string(key)] = true
				}
				payload := next(size)
				for i := range payload {
					if dialled {
						payload[i] ^= key[i%4]
					}
				}
				require.True(t, bytes.Equal(pattern(size), payload), "%d bytes", size)
				frames++
			}
		}
		_, err := in.ReadByte()
		require.Equal(t, io.EOF, err)
		require.NoError(t, <-written)
		if dialled {
			require.Len(t, keys, frames, "a key is used again")
		}
	})
}
