package interop_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const protocolDoc = "../../docs/protocol.md"

var (
	examplePattern = regexp.MustCompile("(?s)```frame\n([^\n]*)\n([0-9a-f \n]*)\n```")
	blockPattern   = regexp.MustCompile("```frame\n")
	fieldPattern   = regexp.MustCompile(`(\w+)=("(?:[^"\\]|\\.)*"|\S*)`)
	layoutPattern  = regexp.MustCompile(`(?m)^\| (\d+) \| ([A-Z0-9_]+) \| (number u32)?`)
)

// Each example of docs/protocol.md is a frame that a published package has
// written, and means to the library what the document says.
func TestExamplesOfTheProtocol(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile(protocolDoc)
	require.NoError(t, err)
	examples := examplePattern.FindAllStringSubmatch(string(doc), -1)
	require.Len(t, examples, len(blockPattern.FindAll(doc, -1)), "an example that can't be read")
	published := vectors(t)
	shown := make(map[wire.Type]bool)
	for _, example := range examples {
		about := example[1]
		encoded, err := hex.DecodeString(strings.Join(strings.Fields(example[2]), ""))
		require.NoError(t, err, "%s", about)
		require.Contains(t, published, string(encoded), "no published package has written: %s", about)

		said := describedFrame(t, about)
		read, err := wire.Parse(encoded)
		require.NoError(t, err, "%s", about)
		require.Equal(t, string(said.Payload), string(read.Payload), "%s", about)
		written, err := wire.Append(nil, &said)
		require.NoError(t, err, "%s", about)
		require.Equal(t, encoded, written, "%s", about)
		shown[read.Type] = true
	}
	require.Len(t, shown, 13, "some types have no example")
}

// The document's table of types has all of them, with their names.
func TestTypesOfTheProtocol(t *testing.T) {
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

// describedFrame makes a frame of an example's first line.
func describedFrame(t *testing.T, about string) wire.Frame {
	t.Helper()
	name, _, _ := strings.Cut(about, " ")
	f := wire.Frame{Type: typeNamed(t, name)}
	fields := fieldPattern.FindAllStringSubmatch(about, -1)
	require.Equal(t, about, name+rejoined(fields), "a field that can't be read")
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

func rejoined(fields [][]string) string {
	var b strings.Builder
	for _, field := range fields {
		fmt.Fprintf(&b, " %s", field[0])
	}
	return b.String()
}

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

// vectors are the frames that the published packages have written, with their
// names.
func vectors(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../internal/cryotest/testdata/vectors.json")
	require.NoError(t, err)
	var file struct {
		Valid []struct{ Name, Hex string }
	}
	require.NoError(t, json.Unmarshal(text, &file))
	found := make(map[string]string)
	for _, v := range file.Valid {
		encoded, err := hex.DecodeString(v.Hex)
		require.NoError(t, err)
		found[string(encoded)] = v.Name
	}
	return found
}
