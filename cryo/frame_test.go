package cryo_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// layouts has every frame type: its name in the protocol and in vectors.json,
// and what stands on the wire.
var layouts = []struct {
	typ     cryo.Type
	name    string
	vector  string
	fixed   int // bytes in front of the payload
	payload bool
}{
	{cryo.TypeTxStart, "TX_START", "tx_start", 21, true},
	{cryo.TypeTxChunk, "TX_CHUNK", "tx_chunk", 17, true},
	{cryo.TypeTxFinish, "TX_FINISH", "tx_finish", 17, false},
	{cryo.TypeTxFlow, "TX_FLOW", "tx_flow", 14, false},
	{cryo.TypeTxFetch, "TX_FETCH", "tx_fetch", 25, false},
	{cryo.TypeTxCancel, "TX_CANCEL", "tx_cancel", 17, false},
	{cryo.TypeBinary, "BINARYDATA", "binary", 13, true},
	{cryo.TypeUTF8, "UTF8DATA", "utf8", 13, true},
	{cryo.TypePingPong, "PING_PONG", "ping_pong", 13, true},
	{cryo.TypeError, "ERROR", "error", 13, true},
	{cryo.TypeAck, "ACK", "ack", 13, false},
	{cryo.TypeBye, "BYE", "bye", 13, true},
	{cryo.TypeEndpointInfo, "ENDPOINT_INFO", "endpoint_info", 25, false},
}

// vector is a frame that the reference wrote, with the fields it put in.
type vector struct {
	Name  string
	Bytes hexBytes `json:"hex"`
	Note  string

	Type       string
	SID        uint64 `json:"sid,string"`
	Ack        uint32
	Version    uint32
	Features   uint64 `json:"features,string"`
	Tx         uint32
	Seq        uint32
	Size       int32
	Start, End uint32
	Behaviour  string

	// At most one of these, by type.
	Stream, Text, Reason string
	Payload              hexBytes `json:"payload_hex"`
}

func (v vector) frame() cryo.Frame {
	f := cryo.Frame{
		SID: v.SID, Ack: v.Ack, Version: v.Version, Features: v.Features,
		Tx: v.Tx, Seq: v.Seq, Size: v.Size, Start: v.Start, End: v.End,
		Flow:    map[string]cryo.Flow{"push": cryo.FlowPush, "pull": cryo.FlowPull}[v.Behaviour],
		Payload: []byte(v.Stream + v.Text + v.Reason + string(v.Payload)),
	}
	for _, l := range layouts {
		if l.vector == v.Type {
			f.Type = l.typ
		}
	}
	return f
}

// malformed is a byte sequence and what the reference said to it.
type malformed struct {
	Name      string
	Bytes     hexBytes `json:"hex"`
	Reference string
}

type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.AppendDecode(nil, text)
	return err
}

func readVectors(tb testing.TB) (valid []vector, bad []malformed) {
	tb.Helper()
	file, err := os.Open("testdata/vectors.json")
	require.NoError(tb, err)
	defer file.Close()

	var vectors struct {
		About     string
		Valid     []vector
		Malformed []malformed
	}
	decoder := json.NewDecoder(file)
	decoder.DisallowUnknownFields() // a field of the reference that nobody compares
	require.NoError(tb, decoder.Decode(&vectors))
	require.NotEmpty(tb, vectors.Valid)
	require.NotEmpty(tb, vectors.Malformed)
	return vectors.Valid, vectors.Malformed
}

// requireFrame compares all fields; a nil payload is as good as an empty one.
func requireFrame(tb testing.TB, want, got cryo.Frame) {
	tb.Helper()
	require.True(tb, bytes.Equal(want.Payload, got.Payload), "payload %q instead of %q", got.Payload, want.Payload)
	want.Payload, got.Payload = nil, nil
	require.Equal(tb, want, got)
}

func requireParses(tb testing.TB, want cryo.Frame, wire []byte) {
	tb.Helper()
	got, err := cryo.ParseFrame(wire)
	require.NoError(tb, err)
	requireFrame(tb, want, got)
}

func requireParseRefused(tb testing.TB, wire []byte) *cryo.FrameError {
	tb.Helper()
	f, err := cryo.ParseFrame(wire)
	var refusal *cryo.FrameError
	require.ErrorAs(tb, err, &refusal)
	require.Zero(tb, f, "a frame beside an error")
	return refusal
}

func requireAppendRefused(tb testing.TB, f cryo.Frame) *cryo.FrameError {
	tb.Helper()
	b, err := cryo.AppendFrame([]byte("in front"), &f)
	var refusal *cryo.FrameError
	require.ErrorAs(tb, err, &refusal)
	require.Equal(tb, "in front", string(b), "a refused frame left something behind")
	return refusal
}

// sample is a frame of the type that may be written.
func sample(typ cryo.Type) cryo.Frame {
	f := cryo.Frame{SID: 1, Type: typ}
	if typ == cryo.TypePingPong {
		f.Payload = []byte("ping")
	}
	return f
}

func appendFrame(tb testing.TB, b []byte, f cryo.Frame) []byte {
	tb.Helper()
	b, err := cryo.AppendFrame(b, &f)
	require.NoError(tb, err)
	return b
}

func TestFramesOfTheReferenceParseAndSerialiseToTheSameBytes(t *testing.T) {
	valid, _ := readVectors(t)
	for _, v := range valid {
		t.Run(v.Name, func(t *testing.T) {
			requireParses(t, v.frame(), v.Bytes)
			require.Equal(t, "in front"+string(v.Bytes), string(appendFrame(t, []byte("in front"), v.frame())))
		})
	}
}

func TestEveryTypeHasAFrameOfTheReference(t *testing.T) {
	valid, _ := readVectors(t)
	seen := map[cryo.Type]bool{}
	for _, v := range valid {
		seen[cryo.Type(v.Bytes[8])] = true
	}
	for _, l := range layouts {
		require.True(t, seen[l.typ], l.name)
	}
}

func TestMalformedFramesAreTakenAsTheReferenceTakesThem(t *testing.T) {
	_, bad := readVectors(t)
	for _, m := range bad {
		t.Run(m.Name, func(t *testing.T) {
			if m.Reference == "accepted" {
				_, err := cryo.ParseFrame(m.Bytes)
				require.NoError(t, err)
				return
			}
			requireParseRefused(t, m.Bytes)
		})
	}
}

func TestBytesBehindAFixedLayoutAreIgnored(t *testing.T) {
	for _, l := range layouts {
		if l.payload {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			requireParses(t, f, append(appendFrame(t, nil, f), "behind"...))
		})
	}
}

func TestInvalidUTF8PassesUnchanged(t *testing.T) {
	f := cryo.Frame{Type: cryo.TypeUTF8, Payload: []byte("a\xffb\x00")}
	requireParses(t, f, appendFrame(t, nil, f))
}

func TestEveryNegativeStreamSizeMeansUnknown(t *testing.T) {
	unknown := cryo.Frame{Type: cryo.TypeTxStart, Size: -1}
	for name, size := range map[string]string{"-1": "ffffffff", "-2": "fffffffe", "least": "80000000"} {
		t.Run(name, func(t *testing.T) {
			wire, err := hex.DecodeString("0000000000000000" + "00" + "00000000" + "00000000" + size)
			require.NoError(t, err)
			requireParses(t, unknown, wire)
		})
	}
}

func TestTruncatedFramesAreRefusedUpToTheirPayload(t *testing.T) {
	valid, _ := readVectors(t)
	for _, v := range valid {
		t.Run(v.Name, func(t *testing.T) {
			whole := v.frame()
			fixed := len(v.Bytes) - len(whole.Payload)
			for size := range v.Bytes {
				wire := bytes.Clone(v.Bytes[:size]) // what lies behind is out of reach
				if size < fixed || whole.Type == cryo.TypePingPong {
					require.Equal(t, size, requireParseRefused(t, wire).Size)
					continue
				}
				cut := whole
				cut.Payload = whole.Payload[:size-fixed]
				requireParses(t, cut, wire)
			}
		})
	}
}

func TestFixedPartsHaveTheirSizes(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			require.Len(t, appendFrame(t, nil, f), l.fixed+len(f.Payload))
		})
	}
}

func TestThirteenTypesAreKnownAndAllOthersRefused(t *testing.T) {
	names := map[cryo.Type]string{}
	for _, l := range layouts {
		names[l.typ] = l.name
	}
	require.Len(t, names, 13)

	for b := range math.MaxUint8 + 1 {
		typ := cryo.Type(b)
		if name, known := names[typ]; known {
			require.Equal(t, name, typ.String())
			requireParses(t, sample(typ), appendFrame(t, nil, sample(typ)))
			continue
		}
		require.Contains(t, typ.String(), "unassigned")
		wire := make([]byte, 64)
		wire[8] = byte(typ)
		require.Equal(t, typ, requireParseRefused(t, wire).Type)
		require.Equal(t, typ, requireAppendRefused(t, sample(typ)).Type)
	}
}

func TestPayloadsOf16MiBPassAndOneByteMoreIsRefused(t *testing.T) {
	const limit = 16 << 20
	require.Equal(t, limit, cryo.MaxPayload)

	payload := make([]byte, limit+1)
	wire := make([]byte, 0, limit+64)
	for _, l := range layouts {
		if !l.payload || l.typ == cryo.TypePingPong {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			f.Payload = payload[:limit]
			wire = appendFrame(t, wire[:0], f)
			requireParses(t, f, wire)

			f.Payload = payload
			tooLong := l.fixed + limit + 1
			require.Equal(t, tooLong, requireParseRefused(t, append(wire, 0)).Size)
			require.Equal(t, tooLong, requireAppendRefused(t, f).Size)
		})
	}
}

func TestTypesWithoutAPayloadAreNotWrittenWithOne(t *testing.T) {
	for _, l := range layouts {
		if l.payload {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			f.Payload = []byte{0}
			require.ErrorContains(t, requireAppendRefused(t, f), "malformed "+l.name+" frame")
		})
	}
}

func TestFramesThatNobodyUnderstandsAreNotWritten(t *testing.T) {
	tests := map[string]struct {
		frame cryo.Frame
		says  string
	}{
		"unknown type":     {cryo.Frame{Type: 6}, "malformed unassigned type 6 frame of 9 bytes: no such frame type"},
		"flow 2":           {cryo.Frame{Type: cryo.TypeTxFlow, Flow: 2}, "malformed TX_FLOW frame of 14 bytes: flow 2 is neither push (0) nor pull (1)"},
		"pang":             {cryo.Frame{Type: cryo.TypePingPong, Payload: []byte("pang")}, "malformed PING_PONG frame of 17 bytes: neither ping nor pong"},
		"ping and more":    {cryo.Frame{Type: cryo.TypePingPong, Payload: []byte("pings")}, "malformed PING_PONG frame of 18 bytes: neither ping nor pong"},
		"ping of nothing":  {cryo.Frame{Type: cryo.TypePingPong}, "malformed PING_PONG frame of 13 bytes: neither ping nor pong"},
		"stream size -2":   {cryo.Frame{Type: cryo.TypeTxStart, Size: -2}, "malformed TX_START frame of 21 bytes: size -2 is neither a size nor -1"},
		"ACK with a byte":  {cryo.Frame{Type: cryo.TypeAck, Payload: []byte{0}}, "malformed ACK frame of 14 bytes: this type carries no payload"},
		"17 MiB of binary": {cryo.Frame{Type: cryo.TypeBinary, Payload: make([]byte, 17<<20)}, "malformed BINARYDATA frame of 17825805 bytes: payload over 16 MiB"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			require.EqualError(t, requireAppendRefused(t, test.frame), test.says)
		})
	}
}

func TestRefusalsOfReceivedBytesSayWhatTheyAre(t *testing.T) {
	tests := map[string]struct {
		wire string
		says string
	}{
		"nothing":      {"", "malformed frame of 0 bytes: shorter than session id and type"},
		"no type":      {"00000000", "malformed frame of 8 bytes: shorter than session id and type"},
		"unknown type": {"00000000\xf8", "malformed unassigned type 248 frame of 9 bytes: no such frame type"},
		"half an ACK":  {"00000000\xfd00", "malformed ACK frame of 11 bytes: shorter than its 13 bytes"},
		"pang":         {"00000000\xfb0000pang", "malformed PING_PONG frame of 17 bytes: neither ping nor pong"},
		"flow 48":      {"00000000\x0300000", "malformed TX_FLOW frame of 14 bytes: flow 48 is neither push (0) nor pull (1)"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			require.EqualError(t, requireParseRefused(t, []byte(test.wire)), test.says)
		})
	}
}

func TestAPayloadIsAPartOfTheBytesAndCannotGrowIntoTheNext(t *testing.T) {
	first := appendFrame(t, nil, cryo.Frame{Type: cryo.TypeUTF8, Payload: []byte("first")})
	both := append(bytes.Clone(first), "second"...)

	f, err := cryo.ParseFrame(both[:len(first)])
	require.NoError(t, err)
	require.Same(t, &both[len(first)-len("first")], &f.Payload[0])
	_ = append(f.Payload, "!!!"...)
	require.Equal(t, "second", string(both[len(first):]))
}

func TestTextIsFitForReading(t *testing.T) {
	tests := map[string]struct{ payload, want string }{
		"nothing":                     {"", ""},
		"plain":                       {"grüße 🧊", "grüße 🧊"},
		"cut by the published peers":  {"\xc3\xa4\x00", "ä"},
		"several NULs":                {"disconnect\x00\x00\x00", "disconnect"},
		"only NULs":                   {"\x00\x00", ""},
		"NULs inside stay":            {"\x00a\x00b", "\x00a\x00b"},
		"invalid UTF-8":               {"a\xffb", "a\uFFFDb"},
		"cut within a rune":           {"gr\xc3", "gr\uFFFD"},
		"cut within a rune, and NULs": {"gr\xc3\x00\x00", "gr\uFFFD"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := cryo.Frame{Type: cryo.TypeBye, Payload: []byte(test.payload)}
			require.Equal(t, test.want, f.Text())
			require.Equal(t, test.payload, string(f.Payload), "the payload itself was changed")
		})
	}
}

func TestFramesAreReadAndWrittenWithoutAllocating(t *testing.T) {
	valid, _ := readVectors(t)
	for _, v := range valid {
		t.Run(v.Name, func(t *testing.T) {
			f, buffer := v.frame(), make([]byte, 0, len(v.Bytes))
			var err error
			require.Zero(t, testing.AllocsPerRun(100, func() { _, err = cryo.ParseFrame(v.Bytes) }), "reading")
			require.NoError(t, err)
			require.Zero(t, testing.AllocsPerRun(100, func() { _, err = cryo.AppendFrame(buffer, &f) }), "writing")
			require.NoError(t, err)
		})
	}
}

func FuzzParseFrame(f *testing.F) {
	valid, bad := readVectors(f)
	for _, v := range valid {
		f.Add([]byte(v.Bytes))
	}
	for _, m := range bad {
		f.Add([]byte(m.Bytes))
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		parsed, err := cryo.ParseFrame(wire)
		if err != nil {
			requireParseRefused(t, wire)
			return
		}
		again := appendFrame(t, nil, parsed)
		requireParses(t, parsed, again)
		if parsed.Size != -1 { // which may have been any negative size
			require.True(t, bytes.HasPrefix(wire, again), "%x became %x", wire, again)
		}
	})
}

func FuzzFrameRoundTrip(f *testing.F) {
	valid, _ := readVectors(f)
	for _, v := range valid {
		s := v.frame()
		f.Add(s.SID, byte(s.Type), byte(s.Flow), s.Ack, s.Tx, s.Seq, s.Start, s.End, s.Size, s.Version, s.Features, s.Payload)
	}
	f.Fuzz(func(t *testing.T, sid uint64, typ, flow byte, ack, tx, seq, start, end uint32, size int32, version uint32, features uint64, payload []byte) {
		written := cryo.Frame{
			SID: sid, Type: cryo.Type(typ), Flow: cryo.Flow(flow), Ack: ack, Tx: tx, Seq: seq, Start: start, End: end,
			Size: size, Version: version, Features: features, Payload: payload,
		}
		wire, err := cryo.AppendFrame(nil, &written)
		if err != nil {
			requireAppendRefused(t, written)
			return
		}
		requireParses(t, onlyItsFields(written), wire)
	})
}

// onlyItsFields is the frame without what its type has no place for.
func onlyItsFields(f cryo.Frame) cryo.Frame {
	only := cryo.Frame{SID: f.SID, Type: f.Type, Ack: f.Ack, Payload: f.Payload}
	switch f.Type {
	case cryo.TypeTxStart:
		only.Tx, only.Size = f.Tx, f.Size
	case cryo.TypeTxChunk:
		only.Ack, only.Tx, only.Seq = 0, f.Tx, f.Seq
	case cryo.TypeTxFinish, cryo.TypeTxCancel:
		only.Tx = f.Tx
	case cryo.TypeTxFlow:
		only.Flow = f.Flow
	case cryo.TypeTxFetch:
		only.Tx, only.Start, only.End = f.Tx, f.Start, f.End
	case cryo.TypeEndpointInfo:
		only.Version, only.Features = f.Version, f.Features
	}
	return only
}
