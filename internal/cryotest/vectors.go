package cryotest

import (
	"bytes"
	_ "embed" // vectors.json
	"encoding/hex"
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

//go:embed testdata/vectors.json
var vectorsFile []byte

// vectorTypes are the frame types by their names in vectors.json.
var vectorTypes = map[string]wire.Type{
	"tx_start": wire.TxStart, "tx_chunk": wire.TxChunk, "tx_finish": wire.TxFinish, "tx_flow": wire.TxFlow,
	"tx_fetch": wire.TxFetch, "tx_cancel": wire.TxCancel, "binary": wire.Binary, "utf8": wire.UTF8,
	"ping_pong": wire.PingPong, "error": wire.Error, "ack": wire.Ack, "bye": wire.Bye, "endpoint_info": wire.EndpointInfo,
}

// Vector is a frame that the reference encoded, with its fields.
type Vector struct {
	Name  string
	Bytes HexBytes `json:"hex"`
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
	Payload              HexBytes `json:"payload_hex"`
}

// Frame returns the frame with the fields.
func (v Vector) Frame() wire.Frame {
	f := wire.Frame{
		SID: v.SID, Ack: v.Ack, Version: v.Version, Features: v.Features,
		Tx: v.Tx, Seq: v.Seq, Size: v.Size, Start: v.Start, End: v.End,
		Flow:    map[string]wire.Flow{"push": wire.FlowPush, "pull": wire.FlowPull}[v.Behaviour],
		Payload: []byte(v.Stream + v.Text + v.Reason + string(v.Payload)),
	}
	f.Type = vectorTypes[v.Type]
	return f
}

// Malformed is an invalid frame, with the reference's reaction.
type Malformed struct {
	Name      string
	Bytes     HexBytes `json:"hex"`
	Reference string
}

// HexBytes are bytes, written in hex.
type HexBytes []byte

// UnmarshalText decodes hex.
func (h *HexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.AppendDecode(nil, text)
	return err
}

// Vectors returns frames that the reference encoded, and malformed ones.
func Vectors(tb testing.TB) (valid []Vector, bad []Malformed) {
	tb.Helper()
	var vectors struct {
		About     string
		Valid     []Vector
		Malformed []Malformed
	}
	decoder := json.NewDecoder(bytes.NewReader(vectorsFile))
	decoder.DisallowUnknownFields() // a field of the reference that no test compares
	require.NoError(tb, decoder.Decode(&vectors))
	require.NotEmpty(tb, vectors.Valid)
	require.NotEmpty(tb, vectors.Malformed)
	return vectors.Valid, vectors.Malformed
}
