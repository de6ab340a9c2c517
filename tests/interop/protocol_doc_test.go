package interop_test

import (
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const protocolDoc = "../../docs/development/protocol.md"

var (
	examplePattern = regexp.MustCompile("(?s)```frame\n([^\n]*)\n([0-9a-f \n]*)\n```")
	blockPattern   = regexp.MustCompile("```frame\n")
	fieldPattern   = regexp.MustCompile(`(\w+)=("(?:[^"\\]|\\.)*"|\S*)`)
	layoutPattern  = regexp.MustCompile(`(?m)^\| (\d+) \| ([A-Z0-9_]+) \| (number u32)?`)
)

// Each example of docs/development/protocol.md is a frame that a published package has sent, and the
// library parses it into the described fields.
func TestProtocolExamplesAreRealFrames(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile(protocolDoc)
	require.NoError(t, err)
	examples := examplePattern.FindAllStringSubmatch(string(doc), -1)
	require.Len(t, examples, len(blockPattern.FindAll(doc, -1)), "an example cannot be parsed")
	published := vectors(t)
	shown := make(map[wire.Type]bool)
	for _, example := range examples {
		about := example[1]
		encoded, err := hex.DecodeString(strings.Join(strings.Fields(example[2]), ""))
		require.NoError(t, err, "%s", about)
		require.Contains(t, published, string(encoded), "no published package has sent: %s", about)

		described := describedFrame(t, about)
		read, err := wire.Parse(encoded)
		require.NoError(t, err, "%s", about)
		require.Equal(t, string(described.Payload), string(read.Payload), "%s", about)
		written, err := wire.Append(nil, &described)
		require.NoError(t, err, "%s", about)
		require.Equal(t, encoded, written, "%s", about)
		shown[read.Type] = true
	}
	require.Len(t, shown, 13, "some types have no example")
}

// The document's table has every frame type, with its name.
func TestProtocolDocumentListsEveryFrameType(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile(protocolDoc)
	require.NoError(t, err)
	rows := layoutPattern.FindAllStringSubmatch(string(doc), -1)
	require.Len(t, rows, 13)
	for _, row := range rows {
		n, err := strconv.ParseUint(row[1], 10, 8)
		require.NoError(t, err)
		require.Equal(t, wire.Type(n).String(), row[2])
		require.Equal(t, wire.Type(n) != wire.TxChunk, row[3] != "", "the number of %s", row[2])
	}
}

// describedFrame returns the frame of an example's first line.
func describedFrame(t *testing.T, about string) wire.Frame {
	t.Helper()
	name, _, _ := strings.Cut(about, " ")
	f := wire.Frame{Type: typeNamed(t, name)}
	fields := fieldPattern.FindAllStringSubmatch(about, -1)
	require.Equal(t, about, name+rejoined(fields), "a field cannot be parsed")
	for _, field := range fields {
		key, value := field[1], field[2]
		switch key {
		case "text", "name":
			text, err := strconv.Unquote(value)
			require.NoError(t, err, "%s", about)
			f.Payload = []byte(text)
			continue
		case "bytes":
			data, err := hex.DecodeString(value)
			require.NoError(t, err, "%s", about)
			f.Payload = data
			continue
		case "size":
			size, err := strconv.ParseInt(value, 10, 32)
			require.NoError(t, err, "%s", about)
			f.Size = int32(size)
			continue
		}
		n, err := strconv.ParseUint(value, 10, 64)
		require.NoError(t, err, "%s", about)
		switch key {
		case "sid":
			f.SID = n
		case "number":
			f.Ack = uint32(n)
		case "version":
			f.Version = uint32(n)
		case "features":
			f.Features = n
		case "stream":
			f.Tx = uint32(n)
		case "index":
			f.Seq = uint32(n)
		case "start":
			f.Start = uint32(n)
		case "end":
			f.End = uint32(n)
		case "flow":
			f.Flow = wire.Flow(n)
		default:
			require.Fail(t, "unknown field", "%s in: %s", key, about)
		}
	}
	return f
}

// rejoined returns the text that the fields were parsed from.
func rejoined(fields [][]string) string {
	var b strings.Builder
	for _, field := range fields {
		fmt.Fprintf(&b, " %s", field[0])
	}
	return b.String()
}

// typeNamed returns the frame type with a name.
func typeNamed(t *testing.T, name string) wire.Type {
	t.Helper()
	for n := range 256 {
		if typ := wire.Type(n); typ.String() == name {
			return typ
		}
	}
	require.Fail(t, "no such type", "%s", name)
	return 0
}

// vectors returns the names of the frames that the published packages have sent, by their
// bytes.
func vectors(t *testing.T) map[string]string {
	t.Helper()
	valid, _ := cryotest.Vectors(t)
	names := make(map[string]string)
	for _, v := range valid {
		names[string(v.Bytes)] = v.Name
	}
	return names
}
