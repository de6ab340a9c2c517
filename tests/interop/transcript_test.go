package interop_test

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// A transcript is what both ends of a real session sent: a frame or a close in each line,
// in the order in which the tap passed them. "<" was sent by the published package, ">" by
// cryo-connect.
type transcript struct {
	about     []string // comments
	dialled   bool     // by cryo-connect
	sendsOnly bool     // cryo-connect rejects messages
	entries   []entry
}

// entry is a frame, or a close.
type entry struct {
	ours   bool
	wire   []byte // nil for a close
	code   int
	reason string
}

const (
	rolePrefix    = "role: "
	dialledRole   = "cryo-connect dialled"
	acceptedRole  = "cryo-connect accepted"
	sendsOnlyRole = ", to send only"
)

// frame parses the frame of an entry that is not a close.
func (e *entry) frame(t *testing.T) wire.Frame {
	t.Helper()
	f, err := wire.Parse(e.wire)
	require.NoError(t, err, "%x", e.wire)
	return f
}

// String is the entry's line in the file.
func (e *entry) String() string {
	who := "<"
	if e.ours {
		who = ">"
	}
	if e.wire == nil {
		return strings.TrimSpace(fmt.Sprintf("%s close %d %s", who, e.code, e.reason))
	}
	f, err := wire.Parse(e.wire)
	about := fmt.Sprint(err)
	if err == nil {
		about = describe(&f)
	}
	return fmt.Sprintf("%s %x  %s", who, e.wire, about)
}

// describe describes a frame for people.
func describe(f *wire.Frame) string {
	s := f.Type.String()
	if f.Type != wire.TxChunk {
		s += fmt.Sprintf(" %d", f.Ack)
	}
	switch f.Type {
	case wire.TxStart:
		s += fmt.Sprintf(" tx %d, %d bytes", f.Tx, f.Size)
	case wire.TxChunk:
		s += fmt.Sprintf(" tx %d, chunk %d", f.Tx, f.Seq)
	case wire.TxFinish, wire.TxCancel:
		s += fmt.Sprintf(" tx %d", f.Tx)
	case wire.TxFlow:
		s += fmt.Sprintf(" flow %d", f.Flow)
	case wire.TxFetch:
		s += fmt.Sprintf(" tx %d, chunks [%d,%d)", f.Tx, f.Start, f.End)
	}
	if len(f.Payload) > 0 {
		s += fmt.Sprintf(" %.40q", f.Payload)
	}
	return s
}

// write writes the file testdata/name.txt.
func (tr *transcript) write(t *testing.T, name string) {
	t.Helper()
	var b strings.Builder
	for _, line := range tr.about {
		fmt.Fprintf(&b, "# %s\n", line)
	}
	role := acceptedRole
	if tr.dialled {
		role = dialledRole
	}
	if tr.sendsOnly {
		role += sendsOnlyRole
	}
	fmt.Fprintf(&b, "%s%s\n", rolePrefix, role)
	for i := range tr.entries {
		fmt.Fprintln(&b, &tr.entries[i])
	}
	require.NoError(t, os.WriteFile(filepath.Join("testdata", name+".txt"), []byte(b.String()), 0o600))
}

// readTranscript reads a file that write has written.
func readTranscript(t *testing.T, file string) *transcript {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	tr := &transcript{}
	for i, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		if comment, ok := strings.CutPrefix(line, "# "); ok {
			tr.about = append(tr.about, comment)
			continue
		}
		if role, ok := strings.CutPrefix(line, rolePrefix); ok {
			tr.dialled = strings.HasPrefix(role, dialledRole)
			tr.sendsOnly = strings.HasSuffix(role, sendsOnlyRole)
			continue
		}
		words := strings.SplitN(line, " ", 4)
		require.GreaterOrEqual(t, len(words), 3, "line %d", i+1)
		e := entry{ours: words[0] == ">"}
		if words[1] == "close" {
			e.code, err = strconv.Atoi(words[2])
			e.reason = strings.Join(words[3:], "")
		} else {
			e.wire, err = hex.DecodeString(words[1])
		}
		require.NoError(t, err, "line %d", i+1)
		tr.entries = append(tr.entries, e)
	}
	require.NotEmpty(t, tr.entries)
	return tr
}

// transcripts returns the files' paths.
func transcripts(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "*.txt"))
	require.NoError(t, err)
	require.NotEmpty(t, files, "no transcripts")
	return files
}

// Every recorded frame is parsed and encoded by the library without a change.
func TestRecordedFramesAreEncodedUnchanged(t *testing.T) {
	t.Parallel()
	types := make(map[wire.Type]bool)
	for _, file := range transcripts(t) {
		for i, e := range readTranscript(t, file).entries {
			if e.wire == nil {
				continue
			}
			f := e.frame(t)
			b, err := wire.Append(nil, &f)
			require.NoError(t, err)
			require.Equal(t, e.wire, b, "%s, frame %d: %s", file, i, describe(&f))
			types[f.Type] = true
		}
	}
	require.Len(t, types, 13, "some types of frames are in no transcript")
}
