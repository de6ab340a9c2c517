package wire_test

import (
	"bytes"
	"encoding/hex"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// layouts has every frame type: its name in the protocol and in vectors.json,
// and what stands on the encoded.
var layouts = []struct {
	typ     wire.Type
	name    string
	vector  string
	fixed   int // bytes in front of the payload
	payload bool
}{
	{wire.TxStart, "TX_START", "tx_start", 21, true},
	{wire.TxChunk, "TX_CHUNK", "tx_chunk", 17, true},
	{wire.TxFinish, "TX_FINISH", "tx_finish", 17, false},
	{wire.TxFlow, "TX_FLOW", "tx_flow", 14, false},
	{wire.TxFetch, "TX_FETCH", "tx_fetch", 25, false},
	{wire.TxCancel, "TX_CANCEL", "tx_cancel", 17, false},
	{wire.Binary, "BINARYDATA", "binary", 13, true},
	{wire.UTF8, "UTF8DATA", "utf8", 13, true},
	{wire.PingPong, "PING_PONG", "ping_pong", 13, true},
	{wire.Error, "ERROR", "error", 13, true},
	{wire.Ack, "ACK", "ack", 13, false},
	{wire.Bye, "BYE", "bye", 13, true},
	{wire.EndpointInfo, "ENDPOINT_INFO", "endpoint_info", 25, false},
}

// requireFrame compares all fields; a nil payload is as good as an empty one.
func requireFrame(tb testing.TB, want, got wire.Frame) {
	tb.Helper()
	require.True(tb, bytes.Equal(want.Payload, got.Payload), "payload %q instead of %q", got.Payload, want.Payload)
	want.Payload, got.Payload = nil, nil
	require.Equal(tb, want, got)
}

func requireParses(tb testing.TB, want wire.Frame, encoded []byte) {
	tb.Helper()
	got, err := wire.Parse(encoded)
	require.NoError(tb, err)
	requireFrame(tb, want, got)
}

func requireParseError(tb testing.TB, encoded []byte) *wire.FrameError {
	tb.Helper()
	f, err := wire.Parse(encoded)
	var refusal *wire.FrameError
	require.ErrorAs(tb, err, &refusal)
	require.Zero(tb, f, "a frame beside an error")
	return refusal
}

func requireAppendError(tb testing.TB, f wire.Frame) *wire.FrameError {
	tb.Helper()
	b, err := wire.Append([]byte("in front"), &f)
	var refusal *wire.FrameError
	require.ErrorAs(tb, err, &refusal)
	require.Equal(tb, "in front", string(b), "a refused frame left something behind")
	return refusal
}

// sample is a frame of the type that may be written.
func sample(typ wire.Type) wire.Frame {
	f := wire.Frame{SID: 1, Type: typ}
	if typ == wire.PingPong {
		f.Payload = []byte("ping")
	}
	return f
}

func appendFrame(tb testing.TB, b []byte, f wire.Frame) []byte {
	tb.Helper()
	b, err := wire.Append(b, &f)
	require.NoError(tb, err)
	return b
}

func TestReferenceFramesRoundTrip(t *testing.T) {
	valid, _ := cryotest.Vectors(t)
	for _, v := range valid {
		t.Run(v.Name, func(t *testing.T) {
			requireParses(t, v.Frame(), v.Bytes)
			require.Equal(t, "in front"+string(v.Bytes), string(appendFrame(t, []byte("in front"), v.Frame())))
		})
	}
}

func TestEveryTypeHasAReferenceFrame(t *testing.T) {
	valid, _ := cryotest.Vectors(t)
	seen := map[wire.Type]bool{}
	for _, v := range valid {
		seen[wire.Type(v.Bytes[8])] = true
	}
	for _, l := range layouts {
		require.True(t, seen[l.typ], l.name)
	}
}

func TestMalformedFramesMatchTheReference(t *testing.T) {
	_, bad := cryotest.Vectors(t)
	for _, m := range bad {
		t.Run(m.Name, func(t *testing.T) {
			if m.Reference == "accepted" {
				_, err := wire.Parse(m.Bytes)
				require.NoError(t, err)
				return
			}
			requireParseError(t, m.Bytes)
		})
	}
}

func TestBytesAfterAFixedLayoutAreIgnored(t *testing.T) {
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
	f := wire.Frame{Type: wire.UTF8, Payload: []byte("a\xffb\x00")}
	requireParses(t, f, appendFrame(t, nil, f))
}

func TestEveryNegativeStreamSizeMeansUnknown(t *testing.T) {
	unknown := wire.Frame{Type: wire.TxStart, Size: -1}
	for name, size := range map[string]string{"-1": "ffffffff", "-2": "fffffffe", "least": "80000000"} {
		t.Run(name, func(t *testing.T) {
			encoded, err := hex.DecodeString("0000000000000000" + "00" + "00000000" + "00000000" + size)
			require.NoError(t, err)
			requireParses(t, unknown, encoded)
		})
	}
}

func TestFramesTruncatedBeforeTheirPayloadAreRejected(t *testing.T) {
	valid, _ := cryotest.Vectors(t)
	for _, v := range valid {
		t.Run(v.Name, func(t *testing.T) {
			whole := v.Frame()
			fixed := len(v.Bytes) - len(whole.Payload)
			for size := range v.Bytes {
				encoded := bytes.Clone(v.Bytes[:size]) // what lies behind is out of reach
				if size < fixed || whole.Type == wire.PingPong {
					require.Equal(t, size, requireParseError(t, encoded).Size)
					continue
				}
				cut := whole
				cut.Payload = whole.Payload[:size-fixed]
				requireParses(t, cut, encoded)
			}
		})
	}
}

func TestFixedPartsHaveTheRightSize(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			require.Len(t, appendFrame(t, nil, f), l.fixed+len(f.Payload))
		})
	}
}

func TestOnlyThirteenTypesAreKnown(t *testing.T) {
	names := map[wire.Type]string{}
	for _, l := range layouts {
		names[l.typ] = l.name
	}
	require.Len(t, names, 13)

	for b := range math.MaxUint8 + 1 {
		typ := wire.Type(b)
		if name, known := names[typ]; known {
			require.Equal(t, name, typ.String())
			requireParses(t, sample(typ), appendFrame(t, nil, sample(typ)))
			continue
		}
		require.Contains(t, typ.String(), "unassigned")
		encoded := make([]byte, 64)
		encoded[8] = byte(typ)
		require.Equal(t, typ, requireParseError(t, encoded).Type)
		require.Equal(t, typ, requireAppendError(t, sample(typ)).Type)
	}
}

func TestPayloadsOverMaxPayloadAreRejected(t *testing.T) {
	const limit = 16 << 20
	require.Equal(t, limit, wire.MaxPayload)

	payload := bytes.Repeat([]byte("x"), limit+1)
	encoded := make([]byte, 0, limit+64)
	for _, l := range layouts {
		if !l.payload || l.typ == wire.PingPong {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			f.Payload = payload[:limit]
			encoded = appendFrame(t, encoded[:0], f)
			requireParses(t, f, encoded)

			f.Payload = payload
			tooLong := l.fixed + limit + 1
			require.Equal(t, tooLong, requireParseError(t, append(encoded, 0)).Size)
			require.Equal(t, tooLong, requireAppendError(t, f).Size)
		})
	}
}

func TestTypesWithoutAPayloadRejectOne(t *testing.T) {
	for _, l := range layouts {
		if l.payload {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			f := sample(l.typ)
			f.Payload = []byte{0}
			require.ErrorContains(t, requireAppendError(t, f), "malformed "+l.name+" frame")
		})
	}
}

func TestInvalidFramesAreNotEncoded(t *testing.T) {
	tests := map[string]struct {
		frame wire.Frame
		want  string
	}{
		"unknown type":     {wire.Frame{Type: 6}, "malformed unassigned type 6 frame of 9 bytes: no such frame type"},
		"flow 2":           {wire.Frame{Type: wire.TxFlow, Flow: 2}, "malformed TX_FLOW frame of 14 bytes: flow 2 is neither push (0) nor pull (1)"},
		"pang":             {wire.Frame{Type: wire.PingPong, Payload: []byte("pang")}, "malformed PING_PONG frame of 17 bytes: neither ping nor pong"},
		"ping and more":    {wire.Frame{Type: wire.PingPong, Payload: []byte("pings")}, "malformed PING_PONG frame of 18 bytes: neither ping nor pong"},
		"ping of nothing":  {wire.Frame{Type: wire.PingPong}, "malformed PING_PONG frame of 13 bytes: neither ping nor pong"},
		"stream size -2":   {wire.Frame{Type: wire.TxStart, Size: -2}, "malformed TX_START frame of 21 bytes: size -2 is neither a size nor -1"},
		"ACK with a byte":  {wire.Frame{Type: wire.Ack, Payload: []byte{0}}, "malformed ACK frame of 14 bytes: this type carries no payload"},
		"17 MiB of binary": {wire.Frame{Type: wire.Binary, Payload: make([]byte, 17<<20)}, "malformed BINARYDATA frame of 17825805 bytes: payload over 16 MiB"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			require.EqualError(t, requireAppendError(t, test.frame), test.want)
		})
	}
}

func TestFrameErrorsNameTheFrame(t *testing.T) {
	tests := map[string]struct {
		encoded string
		want    string
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
			require.EqualError(t, requireParseError(t, []byte(test.encoded)), test.want)
		})
	}
}

func TestPayloadAliasesTheFrameButCannotGrowPastIt(t *testing.T) {
	first := appendFrame(t, nil, wire.Frame{Type: wire.UTF8, Payload: []byte("first")})
	both := append(bytes.Clone(first), "second"...)

	f, err := wire.Parse(both[:len(first)])
	require.NoError(t, err)
	require.Same(t, &both[len(first)-len("first")], &f.Payload[0])
	_ = append(f.Payload, "!!!"...)
	require.Equal(t, "second", string(both[len(first):]))
}

func TestTextIsValidUTF8WithoutTrailingNULs(t *testing.T) {
	tests := map[string]struct{ payload, want string }{
		"nothing":                            {"", ""},
		"plain":                              {"grüße 🧊", "grüße 🧊"},
		"truncated by the published peers":   {"\xc3\xa4\x00", "ä"},
		"several NULs":                       {"disconnect\x00\x00\x00", "disconnect"},
		"only NULs":                          {"\x00\x00", ""},
		"NULs inside stay":                   {"\x00a\x00b", "\x00a\x00b"},
		"invalid UTF-8":                      {"a\xffb", "a\uFFFDb"},
		"truncated within a rune":            {"gr\xc3", "gr\uFFFD"},
		"truncated within a rune, with NULs": {"gr\xc3\x00\x00", "gr\uFFFD"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := wire.Frame{Type: wire.Bye, Payload: []byte(test.payload)}
			require.Equal(t, test.want, f.Text())
			require.Equal(t, test.payload, string(f.Payload), "the payload itself was changed")
		})
	}
}

func TestFramesAreReadAndWrittenWithoutAllocating(t *testing.T) {
	valid, _ := cryotest.Vectors(t)
	for _, v := range valid {
		t.Run(v.Name, func(t *testing.T) {
			f, buffer := v.Frame(), make([]byte, 0, len(v.Bytes))
			var err error
			require.Zero(t, testing.AllocsPerRun(100, func() { _, err = wire.Parse(v.Bytes) }), "reading")
			require.NoError(t, err)
			require.Zero(t, testing.AllocsPerRun(100, func() { _, err = wire.Append(buffer, &f) }), "writing")
			require.NoError(t, err)
		})
	}
}

func FuzzParseFrame(f *testing.F) {
	valid, bad := cryotest.Vectors(f)
	for _, v := range valid {
		f.Add([]byte(v.Bytes))
	}
	for _, m := range bad {
		f.Add([]byte(m.Bytes))
	}
	f.Fuzz(func(t *testing.T, encoded []byte) {
		parsed, err := wire.Parse(encoded)
		if err != nil {
			requireParseError(t, encoded)
			return
		}
		again := appendFrame(t, nil, parsed)
		requireParses(t, parsed, again)
		if parsed.Size != -1 { // which may have been any negative size
			require.True(t, bytes.HasPrefix(encoded, again), "%x became %x", encoded, again)
		}
	})
}

func FuzzFrameRoundTrip(f *testing.F) {
	valid, _ := cryotest.Vectors(f)
	for _, v := range valid {
		s := v.Frame()
		f.Add(s.SID, byte(s.Type), byte(s.Flow), s.Ack, s.Tx, s.Seq, s.Start, s.End, s.Size, s.Version, s.Features, s.Payload)
	}
	f.Fuzz(func(t *testing.T, sid uint64, typ, flow byte, ack, tx, seq, start, end uint32, size int32, version uint32, features uint64, payload []byte) {
		written := wire.Frame{
			SID: sid, Type: wire.Type(typ), Flow: wire.Flow(flow), Ack: ack, Tx: tx, Seq: seq, Start: start, End: end,
			Size: size, Version: version, Features: features, Payload: payload,
		}
		encoded, err := wire.Append(nil, &written)
		if err != nil {
			requireAppendError(t, written)
			return
		}
		if _, err := wire.Parse(encoded); err != nil && strings.HasSuffix(err.Error(), "another protocol, CAMP") {
			return // only a receiver can't take it for Cryo's
		}
		requireParses(t, onlyItsFields(written), encoded)
	})
}

// onlyItsFields is the frame without what its type has no place for.
func onlyItsFields(f wire.Frame) wire.Frame {
	only := wire.Frame{SID: f.SID, Type: f.Type, Ack: f.Ack, Payload: f.Payload}
	switch f.Type {
	case wire.TxStart:
		only.Tx, only.Size = f.Tx, f.Size
	case wire.TxChunk:
		only.Ack, only.Tx, only.Seq = 0, f.Tx, f.Seq
	case wire.TxFinish, wire.TxCancel:
		only.Tx = f.Tx
	case wire.TxFlow:
		only.Flow = f.Flow
	case wire.TxFetch:
		only.Tx, only.Start, only.End = f.Tx, f.Start, f.End
	case wire.EndpointInfo:
		only.Version, only.Features = f.Version, f.Features
	}
	return only
}

// Frames that camp-protocol 1.0.0 and 1.1.4 have written, for a stream with the name "name".
func TestCAMPFramesAreRejected(t *testing.T) {
	for name, encoded := range map[string]string{
		"PING_PONG":                     "0000000000000001fb706f6e67",
		"pushed, 1.0.0":                 "0000000000000001000000000700000003ff00ffffffffffff006e616d65",
		"pulled, 1.0.0":                 "00000000000000010000000007000000030001000000001388006e616d65",
		"pulled, of over 4 GiB, 1.0.0":  "00000000000000010000000007000000030001000165a0bc00006e616d65",
		"pulled, empty, 1.0.0":          "00000000000000010000000007000000030001000000000000006e616d65",
		"pushed, 1.1.4":                 "0000000000000001000000000700000003ffffffffffffffff006e616d65",
		"pulled, 1.1.4":                 "00000000000000010000000007000000030000000000001388016e616d65",
		"pulled, of over 4 GiB, 1.1.4":  "00000000000000010000000007000000030000000165a0bc00016e616d65",
		"pulled, empty, 1.1.4":          "00000000000000010000000007000000030000000000000000016e616d65",
		"pushed, without a name, 1.1.4": "0000000000000001000000000700000003ffffffffffffffff00",
	} {
		b, err := hex.DecodeString(encoded)
		require.NoError(t, err)
		require.ErrorContains(t, requireParseError(t, b), "it is a frame of another protocol, CAMP", name)
	}
}

func TestCryoStreamNamesAreNotMistakenForCAMP(t *testing.T) {
	for _, name := range []string{"", "name", "namespace", "\x00\x00\x00\x00", "abcd\x02e", "grü\x00ße", "氷\x00"} {
		for _, size := range []int32{-1, 0, 1 << 16, math.MaxInt32} {
			if size >= 0 && len(name) > 4 && name[4] <= 1 {
				continue
			}
			f := wire.Frame{SID: 1, Type: wire.TxStart, Size: size, Payload: []byte(name)}
			_, err := wire.Parse(appendFrame(t, nil, f))
			require.NoError(t, err, "%q", name)
		}
	}
}
