package plugin

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const receivesNothing = "this session receives no messages"

func TestReplyIsSentToTheSender(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(listenInput, with(listenOutput, "send_to: session, session_id: '${! @cryo_session_id }'"),
			"mapping: root = content().uppercase()")
		for range 3 {
			client := e.dial()
			m := send(client, "hello")
			back := receiveTexts(t, client, "HELLO")[0]
			m.wantPending(t, "the answer is not acknowledged")
			require.NoError(t, back.Ack())
			m.wantAcked(t, "and now it is")
		}
		require.Equal(t, 1, e.log.count("Listening for Cryo clients"))
		p.stop()
		require.Equal(t, 1, e.log.count("Listener closed"))
	})
}

func TestComponentsSharingAnAddressMustAgree(t *testing.T) {
	for settings, differ := range map[string]string{
		"max_sessions: 5":                                                            "max_sessions",
		"max_sessions: 5, path: /else":                                               "path, max_sessions",
		"tls: { cert_file: a.pem, key_file: b.pem }":                                 "tls.cert_file, tls.key_file",
		"tokens: [ " + token + ", other ]":                                           "tokens",
		"session_expires: root = 5, session_owner: root = 5, max_session_age: 1h":    "session_expires, max_session_age, session_owner",
		"session_expires: root = 5, session_expiry_grace: 1s":                        "session_expires, session_expiry_grace",
		"trusted_proxies: [ 10.0.0.0/8 ], forwarded_header: forwarded":               "trusted_proxies, forwarded_header",
		"allowed_origins: [], session_metadata: { headers: [ x ] }":                  "session_metadata, allowed_origins",
		"max_header_bytes: 1, handshake_timeout: 1s":                                 "handshake_timeout, max_header_bytes",
		"drain_period: 1s":                                                           "drain_period",
		"max_connects_per_second: 5, max_messages_per_second: 6":                     "max_connects_per_second, max_messages_per_second",
		"trusted_proxies: [ 10.0.0.0/8 ], proxy_protocol: true":                      "trusted_proxies, proxy_protocol",
		"max_bytes_per_second: 7":                                                    "max_bytes_per_second",
		"max_buffer_bytes: 1, heartbeat_interval: 1s, max_sessions_per_address: 100": "max_sessions_per_address, max_buffer_bytes, heartbeat_interval",
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			first := e.run("label: first\n"+listenInput, toProbe)
			e.run("label: orders\n"+listenInput, toProbe)
			first.stop() // so that it isn't named
			e.run(fromOnce, "label: answers\n"+with(listenOutput, settings))
			words := "the input cryo_server orders and the output cryo_server answers share the listener on " + somewhere +
				", but differ in " + differ + ": make these fields equal, or use different addresses"
			e.log.want(t, "ERROR Failed to connect to cryo_server: "+words)
			for _, line := range e.log.all() {
				require.NotContains(t, line, token)
			}
		})
	}
}

func TestUnlabelledComponentsAreNamedByTheirPath(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("broker: { inputs: [ "+listenInput+", "+with(listenInput, "max_sessions: 5")+" ] }", toProbe)
		e.log.want(t, " and the input cryo_server at input.broker.inputs.")
	})
}

func TestMessagesWithoutAnInputAreRejectedAfterATimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		early := e.dial()
		begin := time.Now()
		send(early, "early").wantRejected(t, receivesNothing)
		require.Equal(t, noInputTimeout, time.Since(begin))
		send(early, "again").wantRejected(t, receivesNothing)
		send(e.dial(), "late").wantRejected(t, receivesNothing)
		require.Equal(t, noInputTimeout, time.Since(begin), "at once, by now")

		e.run(listenInput, toProbe)
		e.wantReceives(t, early, "there is an input now")
	})
}

func TestLaterInputReceivesWaitingMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		stays, leaves := e.dial(), e.dial()
		waits, lost := send(stays, "waits"), send(leaves, "its client has gone")
		synctest.Wait()
		end(leaves)
		require.Error(t, lost.result(t))
		synctest.Wait()

		e.run(listenInput, toProbe)
		got := e.deliverNext(2)
		require.ElementsMatch(t, []string{"waits", "its client has gone"}, got)
		waits.wantAcked(t, "delivered")
	})
}

func TestMessagesOfAnEndedSessionReleaseTheirMemoryWithoutAnInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 100000"
		e.run(fromOnce, with(listenOutput, settings))
		early := e.dial()
		for range 2 {
			_ = send(early, strings.Repeat("x", 60_000))
		}
		synctest.Wait()
		end(early)
		time.Sleep(noInputTimeout)

		e.run(with(listenInput, settings), toProbe)
		e.wantReceives(t, e.dial(), "delivered")
	})
}

func TestInputThatClosesFirstLeavesTheSessionsForTheOutput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(listenInput, toSerial)
		e.run(fromOnce, listenOutput)
		client := e.dial()
		var sent []*sending
		for i := range 10 {
			sent = append(sent, send(client, fmt.Sprint(i)))
			synctest.Wait()
		}
		// One is in the pipeline, one is handed to it, others wait for that.
		a := e.arrival()
		stopped := sendAny(func() error { in.stop(); return nil })
		stopped.wantPending(t, "one is in the pipeline")
		a.deliver()
		for delivered := len(a.batch); delivered < 10; {
			select {
			case a = <-e.probe.arrivals:
				delivered += len(a.batch)
				a.deliver()
			case err := <-stopped.done:
				require.NoError(t, err)
				delivered = 10
			}
		}
		rejections := 0
		for _, m := range sent {
			if err := m.result(t); err != nil {
				var rejected *cryo.RejectedError
				require.ErrorAs(t, err, &rejected)
				rejections++
			}
		}
		require.Positive(t, rejections, "what was not delivered is not left to wait for ever")

		e.wantSends(t, client, "acknowledged")
		send(client, "for whom?").wantRejected(t, receivesNothing)
	})
}

func TestMessagesOfAKilledInputReleaseTheirMemory(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 100000"
		in := e.run(with(listenInput, settings), toProbe)
		e.run(fromOnce, with(listenOutput, settings))
		client := e.dial()
		big := strings.Repeat("x", 60_000)
		first := send(client, big)
		e.arrival()
		second := send(client, big)
		e.arrival()
		in.kill()
		for _, m := range []*sending{first, second} {
			var rejected *cryo.RejectedError
			require.ErrorAs(t, m.result(t), &rejected, "never an acknowledgement")
		}
		f := e.produce("still read") // its acknowledgement too
		require.NoError(t, receiveTexts(t, client, "still read")[0].Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestTwoInputsShareTheSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(listenInput, toProbe, "mapping: 'root = \"first \" + content()'")
		second := e.run(listenInput, toProbe, "mapping: 'root = \"second \" + content()'")
		clients := []*cryo.Session{e.dial(), e.dial(), e.dial(), e.dial()}
		deliver := func(i int) string {
			m := send(clients[i], fmt.Sprint(i))
			a := e.arrival()
			a.deliver()
			m.wantAcked(t, "delivered")
			return a.texts()[0]
		}
		require.Equal(t, []string{"first 0", "second 1", "first 2", "second 3"},
			[]string{deliver(0), deliver(1), deliver(2), deliver(3)})

		m := send(clients[1], "in flight")
		a := e.arrival()
		stopped := sendAny(func() error { second.stop(); return nil })
		stopped.wantPending(t, "one is in the pipeline")
		a.deliver()
		m.wantAcked(t, "delivered")
		stopped.wantAcked(t, "stopped")
		require.Equal(t, []string{"first 0", "first 1", "first 2", "first 3"},
			[]string{deliver(0), deliver(1), deliver(2), deliver(3)})
		require.Equal(t, "first 4", func() string { clients = append(clients, e.dial()); return deliver(4) }())

		first.stop()
		for _, c := range clients {
			require.ErrorIs(t, c.Err(), net.ErrClosed)
		}
	})
}

func TestLastInputRejectsNothingWhenItCloses(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(listenInput, toSerial)
		client := e.dial()
		var sent []*sending
		for i := range 10 {
			sent = append(sent, send(client, fmt.Sprint(i)))
			synctest.Wait()
		}
		p.kill()
		for _, m := range sent {
			err := m.result(t)
			require.ErrorIs(t, err, net.ErrClosed, "so that it may be sent again, elsewhere")
		}
	})
}

func TestClosingAComponentTwiceReleasesTheListenerOnce(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		conf, err := specs()["input cryo_server"].ParseYAML("{ address: '"+somewhere+"', tokens: [ "+token+" ] }", nil)
		require.NoError(t, err)
		in, err := newServerInput(conf, service.MockResources())
		require.NoError(t, err)
		in.listeners = e.shared
		require.NoError(t, in.Close(t.Context()), "before it has joined")
		require.NoError(t, in.Connect(t.Context()))
		require.NoError(t, in.Connect(t.Context()))
		require.NoError(t, in.Close(t.Context()))
		require.NoError(t, in.Close(t.Context()))
		e.wantSends(t, e.dial(), "the output still listens")
	})
}

func TestAddressIsReusedOnceItIsFree(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(listenInput, toProbe)
		client := e.rawClient() // which reads nothing, so closing takes time
		stopped := sendAny(func() error { first.stop(); return nil })
		stopped.wantPending(t, "the client doesn't close")

		second := e.run(listenInput, toProbe)
		require.Equal(t, 1, e.log.count("Listening for Cryo clients"))
		require.NoError(t, client.WS.Close())
		stopped.wantAcked(t, "stopped")
		synctest.Wait() // the second listens
		e.wantReceives(t, e.dial(), "delivered")
		require.Equal(t, 2, e.log.count("Listening for Cryo clients"))
		second.stop()
		require.Zero(t, e.log.count("Failed to connect"))
	})
}

func TestSlowAddressDoesNotDelayOthers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		resolved := make(chan struct{})
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			if address == "slow.example:80" {
				<-resolved
			}
			return listen(network, address)
		}
		p := e.run(listenInput, toProbe)
		slow := `cryo_server: { address: "slow.example:80", tokens: [ a ] }`
		e.run(slow, toProbe)
		e.run(fromFeed, slow)

		p.stop()
		e.log.want(t, "Listener closed")
		close(resolved)
		time.Sleep(2 * time.Second)
		require.Equal(t, 2, e.log.count("Listening for Cryo clients"), "the slow one once")
		require.Zero(t, e.log.count("ERROR "))
	})
}

func TestPipelineStopsWhileItWaitsForAnAddress(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(listenInput, toProbe)
		client := e.rawClient()
		stopped := sendAny(func() error { first.stop(); return nil })
		stopped.wantPending(t, "the client doesn't close")
		second := e.run(listenInput, toProbe)
		begin := time.Now()
		second.stop()
		require.Zero(t, time.Since(begin))
		require.NoError(t, client.WS.Close())
		stopped.wantAcked(t, "stopped")
	})
}

func TestAddressInUseIsRetried(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		socket, err := e.net.Listen("tcp", somewhere)
		require.NoError(t, err)
		e.run(listenInput, toProbe)
		e.log.want(t, "Failed to connect to cryo_server: field address: listen tcp: address already in use")
		require.NoError(t, socket.Close())
		time.Sleep(2 * time.Second)
		e.wantReceives(t, e.dial(), "delivered")
	})
}

func TestReconnectedClientTakesOverItsSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		ghost := e.dialAs(5)
		first := send(ghost, "first")
		a := e.arrival()
		client := e.dialAs(5)
		require.Error(t, first.result(t))
		second := send(client, "second") // with the first's number
		b := e.arrival()
		a.deliver()
		second.wantPending(t, "only the first was delivered")
		b.deliver()
		second.wantAcked(t, "delivered")
		require.NoError(t, client.Close(context.Background(), ""))
	})
}
