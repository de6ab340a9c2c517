package plugin

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func gzipped(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write([]byte(text))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.String()
}

func tarred(t testing.TB, files ...string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, content := range files {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Mode: 0o600, Size: int64(len(content))}))
		_, err := w.Write([]byte(content))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.String()
}

func TestEachScannerSplitsAStreamIntoMessages(t *testing.T) {
	for _, tt := range []struct {
		scanner, stream string
		want            []string
	}{
		{"to_the_end: {}", "one\ntwo\n", []string{"one\ntwo\n"}},
		{"lines: {}", "one\r\ntwo\nthree", []string{"one", "two", "three"}},
		{"lines: { custom_delimiter: X }", "oneXtwo\nX", []string{"one", "two\n"}},
		{"re_match: { pattern: '(?m)^\\d\\d:' }", "01:a\n02:b\nb\n03:c", []string{"01:a\n", "02:b\nb\n", "03:c"}},
		{"csv: {}", "a,b\n1,2\n3,\"4\n5\"\n", []string{`{"a":"1","b":"2"}`, `{"a":"3","b":"4\n5"}`}},
		{"csv: { parse_header_row: false }", "1,2\n3,4", []string{`["1","2"]`, `["3","4"]`}},
		{"csv: { parse_header_row: false }", "1\r2\r", []string{`["1\r2"]`}},
		{"csv: { custom_delimiter: ';', lazy_quotes: true }", "a;b\n1,\"2;3", []string{`{"a":"1,\"2","b":"3"}`}},
		{"csv: {}", "a,,\n1,,\n2,x,x\n", []string{`{"":"","a":"1"}`, `{"":"x","a":"2"}`}},
		{"skip_bom: { into: { csv: {} } }", "\xEF\xBB\xBF\"a\",b\n1,2\n", []string{`{"a":"1","b":"2"}`}},
		{"chunker: { size: 4 }", "1234567890", []string{"1234", "5678", "90"}},
		{"json_documents: {}", `{"a":1} {"a":2}[3]`, []string{`{"a":1}`, `{"a":2}`, `[3]`}},
		{"json_array: {}", `[{"a":1},{"a":2}]`, []string{`{"a":1}`, `{"a":2}`}},
		{"skip_bom: { into: { lines: {} } }", "\xEF\xBB\xBFone\ntwo", []string{"one", "two"}},
		{"decompress: { algorithm: gzip, into: { lines: {} } }", gzipped(t, "one\ntwo\n"), []string{"one", "two"}},
		{"decompress: { algorithm: pgzip, into: { lines: {} } }", gzipped(t, "one\ntwo"), []string{"one", "two"}},
		{"decompress: { algorithm: gzip, into: { csv: {} } }", gzipped(t, "a\n1\n2\n"), []string{`{"a":"1"}`, `{"a":"2"}`}},
		{"tar: {}", tarred(t, "one", "two"), []string{"one", "two"}},
		{"decompress: { algorithm: gzip, into: { tar: {} } }", gzipped(t, tarred(t, "one", "two")), []string{"one", "two"}},
		{"decompress: { algorithm: pgzip, into: { tar: {} } }", gzipped(t, tarred(t, "one", "two")+strings.Repeat("padding ", 1<<18)), []string{"one", "two"}},
		{"decompress: { algorithm: pgzip, into: { csv: {} } }", gzipped(t, ""), nil},
		{"switch: [ { re_match_name: '\\.log$', scanner: { lines: {} } }, { scanner: { to_the_end: {} } } ]", "one\ntwo", []string{"one", "two"}},
	} {
		t.Run(tt.scanner, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1, streams: { scanner: { "+tt.scanner+" } }"), toProbe)
				stream := sendStream(e.dial(), "a.log", tt.stream)
				arrivals := e.want(tt.want...)
				for _, a := range slices.Backward(arrivals) {
					stream.wantPending(t, "a message is in the pipeline")
					a.deliver()
				}
				stream.wantAcked(t, "all is delivered")
			})
		})
	}
}

func TestFailedScannerCancelsItsStream(t *testing.T) {
	zipped := gzipped(t, strings.Repeat("0123456789\n", 3)+"a last line")
	for _, tt := range []struct {
		scanner, stream string
		want            []string // at most
	}{
		{"csv: {}", "a,b\n1,2\n3\n", []string{`{"a":"1","b":"2"}`}},
		{"csv: {}", "a,b\r1,2\r3,4\r", nil},
		{"csv: {}", "a\r1\r", nil},
		{"csv: {}", "a,b,a\n1,2,3\n", nil},
		{"csv: { continue_on_error: true }", "a,,\n1,,\n2,x,y\n", []string{`{"":"","a":"1"}`}},
		{"decompress: { algorithm: gzip, into: { csv: {} } }", gzipped(t, "a,a\n1,2\n"), nil},
		{"json_array: {}", `[{"a":1},{"a":2}`, []string{`{"a":1}`, `{"a":2}`}},
		{"json_array: {}", `[{"a":1},`, []string{`{"a":1}`}},
		{"json_array: {}", `[{"a":1}][`, []string{`{"a":1}`}},
		{"decompress: { algorithm: gzip, into: { json_array: {} } }", gzipped(t, `[1,2`), []string{`1`, `2`}},
		{"json_documents: {}", `{"a":1} {"a"`, []string{`{"a":1}`}},
		{"tar: {}", strings.Repeat("no archive", 1000), nil},
		{"tar: {}", tarred(t, "one", "two")[:1024+512+2], []string{"one"}},
		{"decompress: { algorithm: gzip }", "not compressed", nil},
		{"lines: { max_buffer_size: 100 }", "one\n" + strings.Repeat("x", 200), []string{"one"}},
		// What was compressed is cut off, or spoilt, though the stream is whole.
		{"decompress: { algorithm: gzip, into: { lines: {} } }", zipped[:len(zipped)-12], []string{"0123456789", "0123456789", "0123456789"}},
		{"decompress: { algorithm: pgzip, into: { lines: {} } }", zipped[:len(zipped)-12], []string{"0123456789"}},
		{"decompress: { algorithm: gzip, into: { csv: { continue_on_error: true, parse_header_row: false } } }", gzipped(t, "1,2\n3,4")[:20], nil},
	} {
		t.Run(tt.scanner, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1, streams: { scanner: { "+tt.scanner+" } }"), toProbe)
				texts := e.deliverAll()
				peer := e.dial()
				sendStream(peer, "bad", tt.stream).wantCancelled(t, "its scanner fails")
				synctest.Wait()
				for _, text := range texts() {
					require.Contains(t, tt.want, text, "a part was passed on as a whole")
				}
				e.log.want(t, "WARN Stream failed", "error=scanner: ")
				e.log.want(t, fmt.Sprint("session=", peer.ID()))
				e.log.want(t, "stream=bad")
				require.NoError(t, peer.Err(), "the session goes on")
			})
		})
	}
}

func TestErrorOfAScannerNamesTheFieldToChange(t *testing.T) {
	for _, tt := range []struct{ scanner, stream, want string }{
		{"lines: {}", strings.Repeat("x", 100_000), "token too long (raise max_buffer_size of the scanner)"},
		{"re_match: { pattern: '(?m)^x$' }", strings.Repeat("y", 100_000), "token too long (raise max_buffer_size of the scanner)"},
		{"decompress: { algorithm: gzip, into: { lines: {} } }", gzipped(t, strings.Repeat("x", 100_000)), "token too long (raise max_buffer_size of the scanner)"},
		{"csv: {}", "\ufeff\"a\",b\n1,2\n", "wrap the csv scanner in skip_bom"},
		{"csv: {}", "a,b\n1,say \"hello\"\n", "set its lazy_quotes"},
		{"csv: {}", "a;b\n1,5;2\n", "wrong number of fields (check custom_delimiter of the csv scanner"},
		{"decompress: { algorithm: gzip }", "not compressed", "invalid header (check algorithm of the decompress scanner)"},
		{"decompress: { algorithm: zlib }", "not compressed", "invalid header (check algorithm of the decompress scanner)"},
	} {
		t.Run(tt.scanner, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "streams: { scanner: { "+tt.scanner+" } }"), toProbe)
				sendStream(e.dial(), "bad", tt.stream).wantCancelled(t, "its scanner fails")
				synctest.Wait()
				e.log.want(t, "WARN Stream failed", "error=scanner: ", tt.want)
			})
		})
	}
}

// The scanner json_array repeats what the stream begins with, if that is not an array.
func TestErrorOfAScannerIsTruncatedAndShowsNoToken(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { scanner: { json_array: {} } }"), toProbe)
		sendStream(e.dial(), "bad", `"`+strings.Repeat("x", 1<<20)+`"`).wantCancelled(t, "its scanner fails")
		synctest.Wait()
		e.log.want(t, "WARN Stream failed", "error=scanner: expected opening '[' but got xxx")
		for _, line := range e.log.all() {
			require.Less(t, len(line), 2000)
		}
	})
	inEngine(t, func(t *testing.T, e *engine) {
		const secret = "s3cret-0123456789"
		e.serveRaw(func(peer *cryotest.Peer) {
			peer.ServerHandshake()
			text := `"` + peer.Request.URL.Query().Get("authorization") + `"`
			peer.WriteFrames(wire.Frame{Type: wire.TxStart, Ack: 1, Tx: 1, Size: -1, Payload: []byte("a")})
			peer.WantFrame("the acknowledgement", cryotest.Acked(1))
			peer.WriteFrames(wire.Frame{Type: wire.TxChunk, Tx: 1, Payload: []byte(text)}, wire.Frame{Type: wire.TxFinish, Ack: 2, Tx: 1})
		})
		e.run("cryo: { url: ws://"+somewhere+", token: "+secret+", streams: { scanner: { json_array: {} } } }", toProbe)
		time.Sleep(time.Second)
		synctest.Wait()
		e.log.want(t, "WARN Stream failed", "error=scanner: (redacted: ")
		e.wantSecret(t, secret)
	})
}

func TestInvalidRowIsForwardedWithContinueOnError(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_batch_count: 1, streams: { scanner: { csv: { continue_on_error: true } } }"), toSerial)
		stream := sendStream(e.dial(), "rows", "a,b\n1,2\n3\n4,5\n")
		for _, want := range []string{"", "wrong number of fields", ""} {
			a := e.arrival()
			err := a.batch[0].GetError()
			if want == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, want)
			}
			a.deliver()
		}
		stream.wantAcked(t, "all rows are delivered")
	})
}

func TestPartialRecordIsNeverDelivered(t *testing.T) {
	text := strings.Repeat("0123456789\n", 200)
	for _, tt := range []struct {
		scanner, part string
		want          []string
	}{
		{"lines: {}", "one\ntwo\nthr", []string{"one", "two"}},
		{"lines: {}", "one\ntwo\n", []string{"one", "two"}},
		{"lines: {}", "no line", nil},
		{"re_match: { pattern: '(?m)^\\d\\d:' }", "01:a\n02:b\n03:c", []string{"01:a\n", "02:b\n"}},
		{"csv: {}", "a,b\n1,2\n3,4", []string{`{"a":"1","b":"2"}`}},
		{"csv: {}", "a,b", nil},
		{"csv: { continue_on_error: true }", "a,b\n1,2\n3,4", []string{`{"a":"1","b":"2"}`}},
		{"csv: { continue_on_error: true }", "a,b\n1,2\n3", []string{`{"a":"1","b":"2"}`}},
		{"csv: { continue_on_error: true }", "a,b\n1,2\n3,\"4", []string{`{"a":"1","b":"2"}`}},
		{"chunker: { size: 4 }", "1234567890", []string{"1234", "5678"}},
		{"json_documents: {}", `{"a":1} {"a":2} {"a"`, []string{`{"a":1}`, `{"a":2}`}},
		{"json_documents: {}", `1 2 34`, []string{`1`, `2`}},
		{"json_array: {}", `[{"a":1},{"a":2},{"a"`, []string{`{"a":1}`, `{"a":2}`}},
		{"to_the_end: {}", "all but the end", nil},
		{"skip_bom: { into: { lines: {} } }", "\xEF\xBB\xBFone\ntwo\nthr", []string{"one", "two"}},
		{"skip_bom: { into: { lines: {} } }", "on", nil},
		{"tar: {}", tarred(t, "one", "two")[:1024+512+2], []string{"one"}},
		{"decompress: { algorithm: gzip }", gzipped(t, text)[:20], nil},
		{"decompress: { algorithm: pgzip }", gzipped(t, text)[:20], nil},
	} {
		t.Run(tt.scanner+" of "+fmt.Sprintf("%.20q", tt.part), func(t *testing.T) {
			test := func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
				st := open(t, peer, "cut off")
				write(t, st, tt.part)
				e.net.cut()
				arrivals := e.want(tt.want...)
				for _, a := range arrivals {
					a.deliver()
				}
				e.wantNoArrival("the rest is no whole record")
				e.log.want(t, "WARN Stream failed", fmt.Sprintf("error=unexpected EOF after %d bytes", len(tt.part)))
				e.log.want(t, fmt.Sprint("session=", peer.ID()))
				e.log.want(t, "stream=cut off")
				require.Error(t, st.Finish())
			}
			atBothInputs(t, "max_batch_count: 1, streams: { scanner: { "+tt.scanner+" } }", test)
		})
	}
}

func TestWholeMessagesOfATruncatedStreamAreDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(with(dialInput, "max_in_flight: 1, "+asLines), toProbe)
		peer := server.session()
		st := open(t, peer, "log")
		write(t, st, "one\ntwo\nthree\nfo")
		server.shutdown() // there will be no next one
		for _, text := range []string{"one", "two", "three"} {
			e.want(text)[0].deliver()
		}
		e.wantNoArrival("the rest is no whole record")
		require.Error(t, st.Finish())
	})
}

func TestTruncatedCompressedStreamDeliversNoPartialLine(t *testing.T) {
	for _, algorithm := range []string{"gzip", "pgzip"} {
		t.Run(algorithm, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1, streams: { scanner: { decompress: { algorithm: "+algorithm+", into: { lines: {} } } } }"), toProbe)
				texts := e.deliverAll()
				var lines strings.Builder
				for i := range 20_000 {
					fmt.Fprintf(&lines, "a line with the number %06d\n", i*7919%1_000_000)
				}
				zipped := gzipped(t, lines.String())
				st := open(t, e.dial(), "log.gz")
				write(t, st, zipped[:len(zipped)/2])
				e.net.cut()
				synctest.Wait()
				for _, text := range texts() {
					require.Len(t, text, len("a line with the number 000000"))
				}
				require.Error(t, st.Finish())
				e.log.want(t, fmt.Sprintf("unexpected EOF after %d bytes", len(zipped)/2))
			})
		})
	}
}

func TestStreamWithTrailingBytesIsAcknowledged(t *testing.T) {
	atBothInputs(t, "max_batch_count: 1, streams: { scanner: { tar: {} } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "archive", tarred(t, "one", "two")+strings.Repeat("padding ", 1<<18))
		arrivals := e.want("one", "two")
		require.Equal(t, "1", meta(arrivals[1].batch[0], "tar_name"))
		arrivals[0].deliver()
		stream.wantPending(t, "a file is in the pipeline")
		arrivals[1].deliver()
		stream.wantAcked(t, "delivered")

		// Not before the stream's own end.
		st := open(t, peer, "archive")
		write(t, st, tarred(t, "three"))
		e.want("three")[0].deliver()
		write(t, st, "padding")
		finish := sendAny(st.Finish)
		finish.wantAcked(t, "delivered before")
	})
}

// sparse is an archive with one file that is almost only a hole.
func sparse(t testing.TB, size int64) string {
	t.Helper()
	file := func(kind byte, content string) string {
		header := []byte(tarred(t, content))[:512]
		header[156] = kind
		copy(header[148:], "        ")
		sum := 0
		for _, b := range header {
			sum += int(b)
		}
		copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
		return string(header) + content + strings.Repeat("\x00", -len(content)&511)
	}
	var attributes strings.Builder
	for _, a := range [][2]string{{"major", "1"}, {"minor", "0"}, {"name", "sparse"}, {"realsize", fmt.Sprint(size)}} {
		record := " GNU.sparse." + a[0] + "=" + a[1] + "\n"
		fmt.Fprintf(&attributes, "%d%s", len(record)+2, record)
	}
	holes := fmt.Sprintf("1\n%d\n1\n", size-1)
	return file(tar.TypeXHeader, attributes.String()) + file(tar.TypeReg, holes+strings.Repeat("\x00", -len(holes)&511)+"x") + strings.Repeat("\x00", 1024)
}

func TestMessageOfACompressedStreamCannotExceedMaxBytes(t *testing.T) {
	zeros := strings.Repeat("\x00", 2<<20)
	for _, tt := range []struct {
		scanner, stream string
		want            []string
	}{
		{"tar: {}", sparse(t, 1<<50), nil},
		{"type: tar, tar: {}", sparse(t, 1<<50), nil},
		{"switch: [ { scanner: { skip_bom: { into: { tar: {} } } } } ]", sparse(t, 1<<50), nil},
		{"decompress: { algorithm: gzip, into: { tar: {} } }", gzipped(t, sparse(t, 1<<50)), nil},
		{"decompress: { algorithm: gzip }", gzipped(t, zeros), nil},
		{"decompress: { algorithm: pgzip }", gzipped(t, zeros), nil},
		{"decompress: { algorithm: gzip, into: { decompress: { algorithm: gzip } } }", gzipped(t, gzipped(t, zeros)), nil},
		{"decompress: { algorithm: gzip, into: { tar: {} } }", gzipped(t, tarred(t, "one", zeros)), []string{"one"}},
		{"decompress: { algorithm: gzip, into: { json_documents: {} } }", gzipped(t, `"one" "`+strings.Repeat("x", 2<<20)), []string{`"one"`}},
		{"decompress: { algorithm: gzip, into: { csv: { parse_header_row: false } } }", gzipped(t, "1,2\n3,"+strings.Repeat("x", 2<<20)), []string{`["1","2"]`}},
		{"decompress: { algorithm: gzip, into: { lines: { omit_empty: true } } }", gzipped(t, "one\n"+strings.Repeat("\n", 2<<20)), []string{"one"}},
		{"decompress: { algorithm: gzip, into: { lines: { max_buffer_size: 10000000 } } }", gzipped(t, "one\n"+strings.Repeat("x", 2<<20)), []string{"one"}},
	} {
		t.Run(tt.scanner, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1, streams: { max_bytes: 1000000, scanner: { "+tt.scanner+" } }"), toProbe)
				texts := e.deliverAll()
				peer := e.dial()
				sendStream(peer, "bomb", tt.stream).wantCancelled(t, "a message would be too large")
				synctest.Wait()
				require.ElementsMatch(t, tt.want, texts())
				e.log.want(t, "WARN Stream failed", "error=scanner: ")
				e.log.want(t, fmt.Sprint("session=", peer.ID()))
				e.log.want(t, "stream=bomb")
				e.log.want(t, "stream exceeds max_bytes: one of its messages is longer than 1000000 bytes")
				require.NoError(t, peer.Err(), "the session goes on")
			})
		})
	}
}

func TestCompressedStreamCanExceedMaxBytesInSmallMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { max_bytes: 10000, scanner: { decompress: { algorithm: gzip, into: { lines: {} } } } }"), toProbe)
		texts := e.deliverAll()
		line := strings.Repeat("x", 999)
		sendStream(e.dial(), "lines", gzipped(t, strings.Repeat(line+"\n", 1000))).wantAcked(t, "each line is small")
		require.Equal(t, slices.Repeat([]string{line}, 1000), texts())
	})
}

// Each row repeats the names of its columns, so that a row of two bytes can be a large message.
func TestMessagesOfAStreamInFlightAreBoundedByMaxBytes(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_batch_count: 1, streams: { max_bytes: 100000, scanner: { csv: {} } }"), toProbe)
		peer := e.dial()
		stream := sendStream(peer, "long names", strings.Repeat("n", 30_000)+"\n"+strings.Repeat("1\n", 10))
		var arrivals []*arrival
		for range 3 {
			arrivals = append(arrivals, e.arrival())
		}
		e.wantNoArrival("the next row exceeds max_bytes together with those in flight")
		time.Sleep(stallTimeout + time.Second)
		e.log.want(t, stallLine)
		sending := send(peer, "beside")
		e.want("beside")[0].deliver()
		sending.wantAcked(t, "messages pass")
		for range 7 {
			arrivals[0].deliver()
			arrivals = append(arrivals[1:], e.arrival())
			e.wantNoArrival("one was delivered, and one has followed")
		}
		stream.wantPending(t, "three rows are in flight")
		for _, a := range arrivals {
			a.deliver()
		}
		stream.wantAcked(t, "all rows are delivered")
	})
}

func TestMessageOfAStreamCannotExceedMaxBytes(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_batch_count: 1, streams: { max_bytes: 100000, scanner: { csv: {} } }"), toProbe)
		sendStream(e.dial(), "escaped", strings.Repeat("\x01", 50_000)+"\n1\n").wantCancelled(t, "JSON escapes the name of the column in six bytes for each of its own")
		e.wantNoArrival("the message is too large")
		e.log.want(t, "stream exceeds max_bytes: one of its messages is longer than 100000 bytes")
	})
}

func TestRecordOfAStreamWithoutMaxBytesIsBounded(t *testing.T) {
	for _, scanner := range []string{"csv: {}", "type: csv, csv: { continue_on_error: true }", "skip_bom: { into: { csv: {} } }", "decompress: { algorithm: gzip, into: { csv: {} } }"} {
		t.Run(scanner, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1, streams: { max_bytes: 0, scanner: { "+scanner+" } }"), toProbe)
				texts := e.deliverAll()
				content := "a\n1\n\"" + strings.Repeat(strings.Repeat("x", 1<<20)+"\n", 66)
				if strings.HasPrefix(scanner, scannerDecompress) {
					content = gzipped(t, content)
				}
				sendStream(e.dial(), "open quote", content).wantCancelled(t, "a quote is never closed")
				synctest.Wait()
				require.Equal(t, []string{`{"a":"1"}`}, texts())
				e.log.want(t, "stream exceeds max_bytes: one of its messages is longer than 67108864 bytes")
			})
		})
	}
}

func TestScannerThatFailsEarlyLeaksNoGoroutine(t *testing.T) {
	// What the test's end finds is a goroutine that waits for ever.
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { scanner: { decompress: { algorithm: gzip, into: { decompress: { algorithm: pgzip, into: { csv: {} } } } } } }"), toProbe)
		sendStream(e.dial(), "no header", gzipped(t, gzipped(t, "a,\"b\"c\n"+strings.Repeat("\x00", 32<<20)))).wantCancelled(t, "its first row is faulty")
	})
}
