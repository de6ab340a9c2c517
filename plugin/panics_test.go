package plugin

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// decrypting panics in the engine's method, whose nonce has to have 12 bytes. In a
// mapping of clients' data both come from outside.
const decrypting = `decrypt_aes("gcm", "0123456789abcdef", "short")`

// oddMappings are results of a mapping that expects an object, by what they are.
var oddMappings = map[string]string{
	"deleted":                 `root = deleted()`,
	"deleted when it's set":   "root.a = 5\n" + `root = deleted()`,
	"null":                    `root = null`,
	"nothing":                 `root = nothing()`,
	"nothing assigned":        `let a = 1`,
	"a field of what is none": `root = this.trace`,
	"text":                    `root = "text"`,
	"text that is JSON":       `root = "{\"traceparent\":5}"`,
	"a number":                `root = 5`,
	"no number":               `root = "NaN".number()`,
	"a huge number":           `root = 9223372036854775807`,
	"an array":                `root = [ 1, null, {} ]`,
	"bytes":                   `root = "ff00".decode("hex")`,
	"an empty object":         `root = {}`,
	"an object of no text":    `root = { "traceparent": 5, "tracestate": null, "a": { "b": [] } }`,
	"a malformed span":        `root = { "traceparent": "00-zz-zz-zz", "tracestate": "=,=", "baggage": "%%%;;;" }`,
	"a huge object":           `root = { "traceparent": "0".repeat(1000000), "tracestate": "a=b,".repeat(100000), "baggage": "a=b,".repeat(100000) }`,
	"a deep object":           `map deep { root = if this.n > 0 { { "n": { "n": this.n - 1 }.apply("deep") } } else { {} } }` + "\n" + `root = { "n": 100 }.apply("deep")`,
	"an error":                `root = throw("no")`,
	"an error when it's set":  "root.a = 5\n" + `root = throw("no")`,
	"recursion without end":   `map again { root = this.apply("again") }` + "\n" + `root = {}.apply("again")`,
	"a panic":                 `root = "x".bytes().` + decrypting,
	"a panic when it's set":   "root.a = 5\n" + `root = content().` + decrypting,
}

// mapped is a mapping as a field's value.
func mapped(mapping string) string { return strconv.Quote(mapping) }

// oddContents are those of messages.
var oddContents = []string{"", "text", "5", "null", "[]", `{"trace":5}`, `{"trace":`, "\xff\xfe\x00", strings.Repeat("[", 20_000), strings.Repeat("x", 1<<16)}

// sendBytes sends a message of any bytes.
func sendBytes(s *cryo.Session, content string) *sending {
	return sendAny(func() error { return s.SendBinary(context.Background(), []byte(content)) })
}

func TestMessageWithoutAValidSpanIsReceivedUnchanged(t *testing.T) {
	for what, mapping := range oddMappings {
		t.Run(what, func(t *testing.T) {
			atBothInputs(t, "extract_tracing_map: "+mapped(mapping), func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
				for _, content := range oddContents {
					m := sendBytes(peer, content)
					a := e.arrival()
					require.Equal(t, []string{content}, a.texts())
					a.deliver()
					m.wantAcked(t, "delivered")
				}
				require.NoError(t, peer.Err())
				require.LessOrEqual(t, e.log.count("Message has no span"), 1)
				require.Zero(t, e.log.count("Mapping failed"), "the engine's own line, one for each message")
			})
		})
	}
}

func TestMessageThatCannotCarryASpanIsSentUnchanged(t *testing.T) {
	// What a mapping assigns to root replaces the message: that is the mapping's.
	assigns := map[string]bool{
		"null": true, "a field of what is none": true, "text": true, "text that is JSON": true, "a number": true, "a huge number": true,
		"an array": true, "bytes": true, "an empty object": true, "an object of no text": true, "a malformed span": true, "a huge object": true, "a deep object": true,
	}
	for what, mapping := range oddMappings {
		t.Run(what, func(t *testing.T) {
			atBothOutputs(t, "inject_tracing_map: "+mapped(mapping), func(t *testing.T, e *engine, peer *cryo.Session) {
				for _, content := range append(oddContents, `{"id":1}`) {
					batch := batchOf(content, "next")
					f := e.produceBatch(batch)
					for _, want := range []string{content, "next"} {
						m := receive(t, peer)
						if !assigns[what] {
							require.Equal(t, want, string(m.Payload))
						}
						require.NoError(t, m.Ack())
					}
					f.wantDelivered(t, "acknowledged")
					kept, err := batch[0].AsBytes()
					require.NoError(t, err)
					require.Equal(t, content, string(kept), "the pipeline's own message stays what it was")
				}
				require.LessOrEqual(t, e.log.count("Message has no span"), 1)
				require.Zero(t, e.log.count("Failed to inject span"), "the engine's own line, one for each message")
			})
		})
	}
}

func TestPanicInAuthorizeDeniesTheClient(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("cryo_server: { address: '"+somewhere+"', max_sessions: 1, authorize: "+mapped(`root = if this.token == "sesame" { true } else { this.token.bytes().`+decrypting+` == "x" }`)+" }", toProbe)
		for range 3 {
			_, err := e.tryDial(cryo.DialOptions{Token: "hush-hush"})
			require.ErrorIs(t, err, cryo.ErrUnauthorized)
		}
		e.log.want(t, "authorize failed: panic in crypto/")
		require.Zero(t, e.log.count("hush"))
		client, err := e.tryDial(cryo.DialOptions{Token: "sesame"})
		require.NoError(t, err, "those who failed hold no slot")
		e.wantReceives(t, client, "delivered")
	})
}

func TestPanicInAFieldFailsOnlyItsMessage(t *testing.T) {
	field := func(name, other string) string {
		return name + ": " + mapped(`${! if content().string() == "poison" { content().`+decrypting+` } else { `+other+` } }`)
	}
	for name, output := range map[string]string{
		"message_type of cryo_server": with(listenOutput, field("message_type", `"utf8"`)),
		"stream.name of cryo_server":  with(listenOutput, "message_type: stream, stream: { "+field("name", `"a"`)+" }"),
		"session_id of cryo_server":   with(listenOutput, "send_to: session, "+field("session_id", `"7"`)),
		"message_type of cryo":        with(dialOutput, field("message_type", `"utf8"`)),
		"stream.name of cryo":         with(dialOutput, "message_type: stream, stream: { "+field("name", `"a"`)+" }"),
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				var peer *cryo.Session
				if strings.HasPrefix(output, "cryo:") {
					server := e.serve()
					e.run(fromOnce, output)
					peer = server.session()
				} else {
					e.run(fromOnce, output)
					var err error
					peer, err = e.tryDial(cryo.DialOptions{Token: token, SessionID: 7})
					require.NoError(t, err)
				}
				acknowledgeAll(peer)
				require.ErrorContains(t, next(t, e.produce("poison").verdict), "panic in crypto/")
				e.produce("a").wantDelivered(t, "the output goes on")
				require.Error(t, next(t, e.produce("a", "poison", "b").verdict), "poison is not delivered")
				e.produce("b").wantDelivered(t, "and on")
			})
		})
	}
}

func TestPanicInMatchSkipsTheSession(t *testing.T) {
	output := "cryo_server: { address: '" + somewhere + "', authorize: 'root.user = this.token', send_to: match, no_session: reject, match: " +
		mapped(`root = if @cryo_session.cryo_auth_user == "poison" { content().`+decrypting+` == "x" } else { true }`) + " }"
	inRooms(t, output, []string{"ann", "poison"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		messages, texts := held(t, clients[0])
		require.Equal(t, []string{"m"}, texts)
		ackAll(t, messages)
		f.wantDelivered(t, "the one that matches has it")
		wantNothing(t, clients[1])
		end(clients[0])
		synctest.Wait()
		require.ErrorContains(t, next(t, e.produce("n").verdict), "panic in crypto/", "none matches")
	})
}

// faulty is a scanner that panics where its streams say, and else makes one message.
type faulty struct{ stream io.ReadCloser }

func (f *faulty) Create(stream io.ReadCloser, _ service.AckFunc, details *service.ScannerSourceDetails) (service.BatchScanner, error) {
	if details.Name() == "create" {
		panic("a fault in create")
	}
	return &faulty{stream}, nil
}

func (f *faulty) NextBatch(context.Context) (service.MessageBatch, service.AckFunc, error) {
	content, err := io.ReadAll(f.stream)
	switch {
	case string(content) == "next":
		_ = content[len("next"):][0] // out of range
	case len(content) > 0:
		return batchOf(string(content)), func(context.Context, error) error { return nil }, nil
	case err == nil:
		err = io.EOF
	}
	return nil, nil, err
}

func (f *faulty) Close(context.Context) error { panic("a fault in close") }

func TestPanicInAScannerCancelsItsStream(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		require.NoError(t, e.env.RegisterBatchScannerCreator("faulty", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchScannerCreator, error) {
			return &faulty{}, nil
		}))
		e.run(with(listenInput, "streams: { scanner: { faulty: {} } }"), toProbe)
		peer := e.dial()
		for name, content := range map[string]string{"create": "c", "next": "next"} {
			sendStream(peer, name, content).wantCancelled(t, "its scanner panics")
			synctest.Wait()
			e.log.want(t, "ERROR Stream failed: the scanner panicked", "error=scanner: panic in github.com/cryo-connect/cryo-connect/plugin.(*faulty).")
			e.log.want(t, fmt.Sprint("session=", peer.ID()))
			e.log.want(t, "stream="+name)
			time.Sleep(time.Second) // there is one such line a second
		}
		stream := sendStream(peer, "good", "content")
		e.want("content")[0].deliver()
		stream.wantAcked(t, "a panic when it is closed takes nothing back")
		require.NoError(t, peer.Err(), "the session goes on")
	})
}
