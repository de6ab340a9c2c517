package plugin

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// oddTexts are values of a field that is interpolated.
var oddTexts = []string{
	"${! this.a }", "${! this.a.b.c }", "${! content() }", "${! content().length() }", "${! deleted() }", "${! nothing() }", "${! null }", "${! [] }",
	`${! throw("no") }`, `${! "NaN".number() }`, "${! content()." + decrypting + " }", "${! @cryo_session_id }", "${! @ }", "${! batch_size() }",
	`${! json("a") }`, `${! content().repeat(9223372036854775807) }`, "${! 9223372036854775807 }", `${! if content().length() > 3 { "stream" } else { "utf8" } }`,
}

// oddMatches are values of match.
var oddMatches = []string{
	"root = true", "root = deleted()", "root = null", "root = this", `root = throw("no")`, "root = content()." + decrypting, "root = @cryo_session",
	"root.a = @cryo_session\nroot = root.a.length() > 0", `root = @cryo_session.cryo_auth_user == content().string()`, `root = this.a > 5`, `meta = deleted()` + "\n" + `root = true`,
}

// oddAuthorizes are values of authorize.
var oddAuthorizes = []string{
	"root = true", "root.user = this.token", "root = this.headers.merge({ \"query\": this.query })", `root.n = "NaN".number()`, "root.deep = [ { \"a\": [ this.query ] } ]",
}

// TestNoMessageMakesAComponentPanicOrHang runs random configurations that lint
// accepts on random messages and streams. Each is settled, whatever the mappings and
// scanners make of it, and no session is lost; a panic would end the test.
//
// CRYO_SEED makes the choices of one run again.
func TestNoMessageMakesAComponentPanicOrHang(t *testing.T) {
	runs := 40
	if os.Getenv("CRYO_LONG_TESTS") != "" {
		runs = 5000
	}
	seed := rand.Uint64()
	if text := os.Getenv("CRYO_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		require.NoError(t, err)
		runs = 1
	}
	scanners := understoodStreams(t)
	for range runs {
		run := &oddRun{rand.New(rand.NewPCG(seed, 0)), scanners}
		if !t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { inEngine(t, run.test) }) {
			return
		}
		seed = rand.Uint64()
	}
}

// oddRun is one of random choices.
type oddRun struct {
	*rand.Rand
	scanners []understood
}

func oddOf[T any](r *oddRun, list []T) T { return list[r.IntN(len(list))] }

// maybe is a field, or none.
func (r *oddRun) maybe(name, value string) string {
	if r.IntN(2) == 0 {
		return ""
	}
	return name + ": " + value + ", "
}

func (r *oddRun) mapping() string {
	return mapped(oddMappings[oddOf(r, slices.Sorted(maps.Keys(oddMappings)))])
}

func (r *oddRun) test(t *testing.T, e *engine) {
	if r.IntN(2) == 0 {
		e.spans = &spanBook{}
	}
	scanner, dials := oddOf(r, r.scanners), r.IntN(3) == 0
	input, output := r.components(scanner, dials)
	t.Log(input)
	t.Log(output)
	require.Empty(t, lint(t, "input", input))
	require.Empty(t, lint(t, "output", output))

	var peers []*cryo.Session
	if dials {
		server := e.serve()
		defer e.run(input, output).stop()
		peers = []*cryo.Session{server.session(), server.session()}
	} else {
		defer e.run(input, output).stop()
		peers = r.clients(t, e)
	}
	if len(peers) == 0 {
		return // authorize lets nobody in
	}
	for _, s := range peers {
		acknowledgeAll(s)
	}
	var sent []oddSending
	for range 20 {
		sent = append(sent, r.send(oddOf(r, peers), scanner))
	}
	for _, m := range sent {
		select {
		case err := <-m.done:
			t.Logf("%s: %.100v", m.what, err)
		case <-time.After(time.Hour):
			require.FailNow(t, "not settled", m.what)
		}
	}
	for _, s := range peers {
		require.NoError(t, s.Err())
	}
}

// components are an input and an output; those that listen share a listener, so that
// what clients send goes back to them.
func (r *oddRun) components(scanner understood, dials bool) (input, output string) {
	receiving := "message_types: [ utf8, binary, stream, error ], auto_replay_nacks: false, ack_timeout: 5s, " +
		r.maybe("extract_tracing_map", r.mapping()) + r.maybe("include_metadata", "false") + r.maybe("max_batch_count", "1") +
		"streams: { " + r.maybe("max_bytes", "100000") + "scanner: { " + scanner.scanner + " } }"
	sending := "ack_timeout: 5s, " + r.maybe("inject_tracing_map", r.mapping()) + r.maybe("message_type", mapped(oddOf(r, oddTexts))) +
		"stream: { " + r.maybe("name", mapped(oddOf(r, oddTexts))) + "chunk_bytes: 1000 }"
	if dials {
		return with(dialInput, receiving), with(dialOutput, sending)
	}
	listening := "cryo_server: { address: '" + somewhere + "', authorize: " + mapped(oddOf(r, oddAuthorizes)) +
		", session_metadata: { query_parameters: [ room ], headers: [ X-Room ] } }"
	to := oddOf(r, []string{
		"send_to: all",
		"send_to: any",
		"send_to: match, match: " + mapped(oddOf(r, oddMatches)),
		"send_to: session, session_id: " + mapped(oddOf(r, oddTexts)),
	}) + ", no_session: " + oddOf(r, []string{"wait", "reject", "drop"}) + ", "
	return with(listening, receiving), with(listening, to+sending)
}

// clients are those of two that are let in.
func (r *oddRun) clients(t *testing.T, e *engine) (clients []*cryo.Session) {
	for range 2 {
		s, err := e.tryDial(cryo.DialOptions{
			Token:  token + r.text(),
			Query:  url.Values{"room": {r.text()}, r.text(): {r.text()}},
			Header: http.Header{"X-Room": {url.QueryEscape(r.text())}},
		})
		if err == nil {
			clients = append(clients, s)
		} else {
			t.Log(err)
		}
	}
	return clients
}

// oddSending is of a message or a stream.
type oddSending struct {
	*sending
	what string
}

// text is a short one of any bytes.
func (r *oddRun) text() string {
	return oddOf(r, []string{"", "a", "=&%;", "\x00\xff", "\r\nX: y", "{}", "{\"a\":1e999}", "é😀", strings.Repeat("x", 3000)})
}

// send sends a message or a stream.
func (r *oddRun) send(s *cryo.Session, scanner understood) oddSending {
	content := oddOf(r, oddContents)
	switch r.IntN(6) {
	case 0:
		content = string([]byte{byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())})
	case 1:
		content = `{"a":` + oddOf(r, []string{"1e999", "-0", "\"NaN\"", "[[]]", "{\"b\":{\"c\":null}}", "9223372036854775808", "\"\\ud800\""}) + "}"
	case 2, 3:
		content = r.garbled(scanner.stream)
	case 4:
		if r.IntN(50) == 0 {
			content = strings.Repeat("x", cryo.MaxPayload)
		}
	}
	toStream := r.IntN(4) == 0
	if toStream && (strings.HasPrefix(scanner.scanner, "chunker") || strings.HasPrefix(scanner.scanner, "re_match")) {
		// These make a message of every few bytes, and inject_tracing_map may put
		// 1.8 MB on each: a long stream takes hours.
		content = content[:min(len(content), 300)]
	}
	what := fmt.Sprintf("%.60q", content)
	if toStream {
		return oddSending{sendStream(s, oddOf(r, []string{"", "a.csv", "../x", "\xff\x00", strings.Repeat("n", 1000)}), content), "stream " + what}
	}
	if r.IntN(3) == 0 {
		return oddSending{sendAny(func() error { return s.SendText(context.Background(), strings.ToValidUTF8(content, "?")) }), "text " + what}
	}
	return oddSending{sendBytes(s, content), "bytes " + what}
}

// garbled changes some bytes of a stream.
func (r *oddRun) garbled(stream string) string {
	b := []byte(stream)
	for range r.IntN(4) {
		if at := r.IntN(len(b) + 1); at < len(b) {
			switch r.IntN(3) {
			case 0:
				b[at] = byte(r.Uint32())
			case 1:
				b = b[:at]
			case 2:
				b = slices.Insert(b, at, b[:r.IntN(at+1)]...)
			}
		}
	}
	return string(b)
}
