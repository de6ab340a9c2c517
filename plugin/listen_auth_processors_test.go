package plugin

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/network"
)

// asking is a component whose authorize has processors, in YAML.
func asking(authorize string, processors ...string) string {
	return "cryo_server: { address: '" + somewhere + "', authorize: " + mapped(authorize) +
		", authorize_processors: [ " + strings.Join(processors, ", ") + " ] }"
}

// accounts is a processor that stands for an authorization service. Each component that has it
// builds one.
type accounts struct {
	number int // the first processor that is built has number 1
	book   *accountsBook
}

// accountsBook records what becomes of the processors accounts.
type accountsBook struct {
	mu      sync.Mutex
	built   int
	closed  []int
	running int
	answer  func(ctx context.Context, number int) // before the answer; nil: immediate
}

func (b *accountsBook) locked(do func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	do()
}

// accounts registers the processor, whose answer is its number.
func (e *engine) accounts() *accountsBook {
	b := &accountsBook{}
	require.NoError(e.t, e.env.RegisterProcessor("accounts", service.NewConfigSpec().Field(service.NewAnyField("options").Optional()),
		func(*service.ParsedConfig, *service.Resources) (service.Processor, error) {
			a := &accounts{book: b}
			b.locked(func() { b.built++; a.number = b.built })
			return a, nil
		}))
	return b
}

func (a *accounts) Process(ctx context.Context, m *service.Message) (service.MessageBatch, error) {
	a.book.locked(func() { a.book.running++ })
	defer a.book.locked(func() { a.book.running-- })
	if a.book.answer != nil {
		a.book.answer(ctx, a.number)
	}
	m.SetStructured(a.number)
	return service.MessageBatch{m}, ctx.Err()
}

func (a *accounts) Close(context.Context) error {
	a.book.locked(func() { a.book.closed = append(a.book.closed, a.number) })
	return nil
}

func TestAuthorizeReceivesTheAnswerOfTheProcessors(t *testing.T) {
	for processor, want := range map[string]string{
		`{ mapping: 'root = { "user": "ann", "roles": [ 1 ] }' }`:                  `{"roles":[1],"user":"ann"}`,
		`{ mapping: 'root = "{\"user\":\"ann\"}"' }`:                               `{"user":"ann"}`,
		`{ mapping: 'root = "granted"' }`:                                          `"granted"`,
		`{ mapping: 'root = ""' }`:                                                 `""`,
		`{ mapping: 'root = true' }`:                                               `true`,
		`{ mapping: 'root = null' }`:                                               `null`,
		`{ mapping: 'root = "[1]"' }`:                                              `[1]`,
		`{ mapping: 'root = this.token' }, { mapping: 'root = content() + "!" ' }`: `"open sesame!"`,
		`{ try: [ { mapping: 'root = throw("no")' } ] }, { catch: [ { mapping: 'root = "caught"' } ] }`: `"caught"`,
	} {
		t.Run(processor, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(asking(`root = { "answer": this.answer.format_json(no_indent: true).string() }`, processor), toProbe)
				send(e.dial(), "hello")
				require.Equal(t, want, metadataOf(t, e.arrival().batch[0])["cryo_auth_answer"])
			})
		})
	}
}

func TestProcessorsReceiveTheInputOfAuthorize(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(asking(`root.same = this.answer == this.without("answer")`+"\n"+`root.room = this.answer.query.room`+"\n"+`root.keys = this.answer.keys().sort().join(" ")`, `{ noop: {} }`), toProbe)
		client, err := e.tryDial(cryo.DialOptions{Token: token, Query: url.Values{"room": {"5"}}})
		require.NoError(t, err)
		send(client, "hello")
		got := metadataOf(t, e.arrival().batch[0])
		require.Equal(t, "true", got["cryo_auth_same"])
		require.Equal(t, "5", got["cryo_auth_room"])
		require.Equal(t, "client_certificate headers query remote_address session_id token", got["cryo_auth_keys"])
	})
}

func TestClientMayReconnectWhenProcessorsFail(t *testing.T) {
	const secret = "tenant1:s3cr3tpassword"
	for processor, log := range map[string]string{
		`{ mapping: 'root = throw("not " + this.token.slice(8))' }`:                                        "authorize_processors failed: the error is redacted",
		`{ mapping: 'root = throw("not " + this.token.slice(8))' }, { mapping: 'root = true' }`:            "authorize_processors failed: the error is redacted",
		`{ mapping: 'root = this.token.bytes().` + decrypting + `' }`:                                      "authorize_processors failed: panic in crypto/",
		`{ sleep: { duration: 1h } }`:                                                                      "authorize_processors failed: no result within handshake_timeout",
		`{ mapping: 'root = [ 1, 2 ]' }, { unarchive: { format: json_array } }`:                            "authorize_processors returned 2 messages, but must return one",
		`{ mapping: 'root = throw("unexpected response code (502): " + this.token)' }`:                     "authorize_processors failed: HTTP status 502",
		`{ http: { url: "http://127.0.0.1:1/authorize?token=${! this.token }", verb: POST, retries: 0 } }`: "authorize_processors failed: dial tcp 127.0.0.1:1: connect: connection refused",
	} {
		t.Run(processor, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(asking("root = true", processor), toProbe)
				begin := time.Now()
				denied := e.wantDenied(cryo.DialOptions{Token: secret, ConnectTimeout: time.Minute}, http.StatusServiceUnavailable)
				require.Equal(t, "Clients cannot be authorized at the moment. Try again later.", denied.Message)
				require.LessOrEqual(t, time.Since(begin), cryo.DefaultHandshakeTimeout)
				e.log.want(t, "Denied a client", "status=503", "cause=authorizing: "+log)
				require.Equal(t, int64(1), e.metrics.value("cryo_sessions_denied{status=503}"))
				for _, line := range e.log.all() {
					if strings.Contains(line, "Denied a client") { // the processor has its own lines
						require.NotContains(t, line, "s3cr3t")
						require.NotContains(t, line, "password")
						require.NotContains(t, line, "[token]")
					}
				}
			})
		})
	}
}

func TestProcessorsThatDeleteTheMessageDenyTheClient(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(asking("root = true", `{ mapping: 'root = if this.token == "guest" { deleted() }' }`), toProbe)
		e.wantDenied(cryo.DialOptions{Token: "guest"}, http.StatusUnauthorized)
		e.log.want(t, "denied by the processors of the field authorize_processors, which deleted the message")
		e.dial()
	})
}

func TestProcessorsRunForALimitedNumberOfClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		book, release := e.accounts(), make(chan struct{})
		e.run(with(asking("root = true", "{ accounts: {} }"), "trusted_proxies: [ 192.0.2.1 ]"), toProbe)
		connected := e.dial()
		book.answer = func(ctx context.Context, _ int) {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
		dial := func(n int, address string) (dials []*sending) {
			for range n {
				dials = append(dials, sendAny(func() error {
					_, err := e.tryDial(cryo.DialOptions{Token: token, ConnectTimeout: time.Minute, Header: http.Header{"X-Forwarded-For": {address}}})
					return err
				}))
			}
			return dials
		}
		running := func(n int, why string) {
			t.Helper()
			synctest.Wait()
			book.locked(func() { require.Equal(t, n, book.running, why) })
		}
		dials := dial(maxAuthorizing+44, "203.0.113.1")
		running(maxAuthorizing/2, "from one address")
		dials = append(dials, dial(44, "2001:db8::1")...)
		running(maxAuthorizing/2+44, "others need not wait")
		dials = append(dials, dial(44, "2001:db8::2")...)
		running(maxAuthorizing/4*3, "from one network")
		for n := range 7 {
			dials = append(dials, dial(44, fmt.Sprintf("203.0.113.%d", n+2))...)
			synctest.Wait()
		}
		running(maxAuthorizing, "in all")
		dials = append(dials, dial(1, "198.51.100.1")...)
		isRunning := func() bool {
			synctest.Wait()
			slots := e.shared.byAddr[somewhere].users[0].processors.networks[network.Of("198.51.100.1")]
			held, _ := slots.Usage()
			return held == 1
		}
		require.False(t, isRunning())
		release <- struct{}{}
		require.True(t, isRunning(), "another address has the next run that ends, before those that have waited")
		e.wantReceives(t, connected, "the pipeline serves who is connected")

		close(release)
		for _, d := range dials {
			d.wantAcked(t, "the others have waited")
		}

		release = make(chan struct{}) // for ever
		dials = append(dial(maxAuthorizing, "203.0.113.1"), dial(maxAuthorizing, "203.0.113.2")...)
		time.Sleep(cryo.DefaultHandshakeTimeout)
		for _, d := range dials {
			var denied *cryo.HandshakeError
			require.ErrorAs(t, d.result(t), &denied)
			require.Equal(t, http.StatusServiceUnavailable, denied.StatusCode)
		}
		running(0, "all have ended")
		for _, c := range e.shared.byAddr[somewhere].users {
			require.Empty(t, c.processors.networks)
			require.Zero(t, c.processors.slots.Used())
		}
	})
}

func TestProcessorsEndWhenTheClientDisconnects(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		book := e.accounts()
		book.answer = func(ctx context.Context, _ int) { <-ctx.Done() }
		e.run(asking("root = true", "{ accounts: {} }"), toProbe)
		_, err := e.tryDial(cryo.DialOptions{Token: token, ConnectTimeout: time.Second})
		require.Error(t, err)
		synctest.Wait()
		book.locked(func() { require.Zero(t, book.running) })
	})
}

func TestProcessorsThatIgnoreTheTimeoutDoNotDelayTheClient(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		book := e.accounts()
		book.answer = func(context.Context, int) { time.Sleep(time.Hour) }
		p := e.run(asking("root = true", "{ accounts: {} }"), toProbe)
		begin := time.Now()
		e.wantDenied(cryo.DialOptions{Token: token, ConnectTimeout: time.Minute}, http.StatusServiceUnavailable)
		require.Equal(t, cryo.DefaultHandshakeTimeout, time.Since(begin))
		e.log.want(t, "Denied a client", "no result within handshake_timeout")
		book.locked(func() { require.Equal(t, 1, book.running) })
		for range 2 * maxAuthorizing {
			go func() { _, _ = e.tryDial(cryo.DialOptions{Token: token, ConnectTimeout: time.Minute}) }()
		}
		time.Sleep(time.Minute)
		book.locked(func() { require.Equal(t, maxAuthorizing/2, book.running, "they still count") })

		p.stop()
		require.Equal(t, time.Hour, time.Since(begin).Truncate(time.Minute), "they are closed when they have returned")
		require.Equal(t, []int{1}, book.closed)
	})
}

func TestProcessorsOfTheFirstComponentAuthorizeUntilItHasLeft(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		book := e.accounts()
		config := asking("root.processor = this.answer", "{ accounts: {} }")
		first := e.run(config, toProbe)
		e.run(fromOnce, config)
		third := e.run(config, toProbe)
		by := func() any {
			send(e.dial(), "hello")
			a := e.arrival()
			a.deliver()
			return metadataOf(t, a.batch[0])["cryo_auth_processor"]
		}
		require.Equal(t, "1", by())

		book.answer = func(_ context.Context, number int) {
			if number == 1 {
				time.Sleep(3 * time.Second)
				book.locked(func() { require.Empty(t, book.closed) })
			}
		}
		dial := sendAny(func() error {
			_, err := e.tryDial(cryo.DialOptions{Token: token})
			return err
		})
		time.Sleep(time.Second)
		stopped := sendAny(func() error { first.stop(); return nil })
		time.Sleep(time.Second)
		require.Equal(t, "2", by(), "the next one authorizes at once")
		stopped.wantPending(t, "its processors still run for a client")
		dial.wantAcked(t, "which is accepted")
		stopped.wantAcked(t, "and then they are closed")
		book.locked(func() { require.Equal(t, []int{1}, book.closed) })

		third.stop()
		book.locked(func() { require.Equal(t, []int{1, 3}, book.closed) })
	})
}

func TestProcessorsAreClosedWithTheirComponent(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		book := e.accounts()
		p := e.run(asking("root = true", "{ accounts: {} }", "{ accounts: {} }"), toProbe)
		require.Equal(t, 2, book.built, "lint builds none")
		e.dial()
		p.stop()
		require.Equal(t, []int{1, 2}, book.closed)

		taken, err := e.net.Listen("tcp", somewhere)
		require.NoError(t, err)
		p = e.run(asking("root = true", "{ accounts: {} }"), toProbe)
		p.kill()
		require.Equal(t, []int{1, 2, 3}, book.closed, "without ever having listened")
		require.NoError(t, taken.Close())
	})
}

func TestHangingProcessorsDoNotDelayTheEndOfTheListener(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		book := e.accounts()
		book.answer = func(ctx context.Context, _ int) { <-ctx.Done() }
		p := e.run(asking("root = true", "{ accounts: {} }"), toProbe)
		dial := sendAny(func() error {
			_, err := e.tryDial(cryo.DialOptions{Token: token})
			return err
		})
		synctest.Wait()
		begin := time.Now()
		p.stop()
		require.Less(t, time.Since(begin), time.Second)
		require.Error(t, dial.result(t))
		require.Equal(t, []int{1}, book.closed)
	})
}

func TestComponentsSharingAnAddressMustHaveEqualProcessors(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.accounts()
		e.run(asking("root = true", `{ accounts: { options: { a: 1, b: "${TOKEN:hush}" } } }`), toProbe)
		e.run(fromOnce, asking("root = true", "{ accounts: {options: {b: hush, # a comment\n a: 1}}}"))
		require.Zero(t, e.log.count("ERROR "))
		e.run(fromOnce, asking("root = true", `{ accounts: { options: { a: 2, b: hush } } }`))
		e.log.want(t, "share the listener on "+somewhere+", but differ in authorize_processors: make")
		require.Zero(t, e.log.count("hush"))
	})
}

func TestProcessorsRequireAuthorize(t *testing.T) {
	err := construct(t, "input", "cryo_server", "{ address: '"+somewhere+"', tokens: [ a ], authorize_processors: [ { noop: {} } ] }")
	require.ErrorContains(t, err, "the field authorize_processors requires the field authorize")
}

func TestProcessorsWithAnUnknownResourceFailTheStart(t *testing.T) {
	err := construct(t, "input", "cryo_server", "{ address: '"+somewhere+"', authorize: 'root = this.answer', authorize_processors: [ { cached: { key: a, cache: nowhere, processors: [] } } ] }")
	require.ErrorContains(t, err, "field authorize_processors: ")
	require.ErrorContains(t, err, "nowhere")
}

func TestResponseThatEchoesTheRequestIsDenied(t *testing.T) {
	const echo = `{ noop: {} }`
	for authorize, log := range map[string]string{
		`root = this`:                                                    "the field token",
		`root = this.answer`:                                             "the field token",
		`root.a = [ { "b": this.answer } ]`:                              "contains the token",
		`root.a.b = this.answer.without("token")`:                        "the whole query or all headers",
		`root.a = [ this.answer.query ]`:                                 "the whole query or all headers",
		`root.a.b.c = this.answer.headers`:                               "the whole query or all headers",
		`root = this.answer.with("client_certificate")`:                  "whose fields are all null",
		`root = if this.answer.token == "guest" { true } else { false }`: "denied by the field authorize",
	} {
		t.Run(authorize, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(asking(authorize, echo), toProbe)
				e.wantDenied(cryo.DialOptions{Token: token, Query: url.Values{"room": {"5"}}}, http.StatusUnauthorized)
				e.log.want(t, log)
				e.wantSecret(t, token)
			})
		})
	}
}

func TestIntegersInMetadataKeepTheirDigits(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(asking(`root = match { this.query.by == "exactly" => this.token.parse_json(use_number: true), _ => this.token.parse_json() }`), toProbe)
		rng := rand.New(rand.NewPCG(20, 21))
		integers := []int64{1<<53 - 1, 1 << 53, 1<<53 + 1, -1 << 53, 1 - 1<<53, 1234567890123456785, math.MaxInt64, math.MinInt64}
		for range 30 {
			integers = append(integers, rng.Int64()>>rng.IntN(63), -rng.Int64()>>rng.IntN(63))
		}
		for _, n := range integers {
			digits := strconv.FormatInt(n, 10)
			claims := fmt.Sprintf(`{"uid":%s,"nested":{"uids":[%s]}}`, digits, digits)
			isExact := n < 1<<53 && n > -1<<53
			for by, accepted := range map[string]bool{"exactly": true, "roughly": isExact} {
				opts := cryo.DialOptions{Token: claims, Query: url.Values{"by": {by}}}
				if !accepted {
					e.wantDenied(opts, http.StatusUnauthorized)
					time.Sleep(time.Second) // of the log's limit
					continue
				}
				client, err := e.tryDial(opts)
				require.NoError(t, err, digits)
				send(client, "hello")
				a := e.arrival()
				a.deliver()
				require.Equal(t, digits, metadataOf(t, a.batch[0])["cryo_auth_uid"])
				require.Equal(t, `{"uids":[`+digits+`]}`, metadataOf(t, a.batch[0])["cryo_auth_nested"])
				end(client)
			}
		}
		e.log.want(t, "authorize returned an integer of 2^53 or more, which may have lost digits")
	})
}

func TestRoundedIntegersAreFoundAtAnyDepth(t *testing.T) {
	for _, value := range []any{
		map[string]any{"a": float64(1 << 53)},
		map[string]any{"a": []any{"b", []any{-1e300}}},
		map[string]any{"a": map[string]any{"b": []any{map[string]any{"c": math.Inf(1)}}}},
	} {
		require.ErrorContains(t, checkGranted(value, token), "2^53")
	}
	require.NoError(t, checkGranted(map[string]any{"a": []any{0.5, 1e15, "9007199254740993", int64(math.MaxInt64), uint64(math.MaxUint64), nil}}, token))
}
