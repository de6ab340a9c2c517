package plugin

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// An echo on a shared session: a request is acknowledged when its answer is, and
// that acknowledgement comes behind all that the client has sent before.

const toTheSender = "send_to: session, session_id: '${! @cryo_session_id }'"

// echoed counts what a client got for what it sent.
type echoed struct{ acks, rejections, answers int }

// talk sends n messages of 32 bytes, and acknowledges what comes behind them, as a
// client with one queue does. It reads meanwhile, or only when all is sent, until
// each message has its verdict.
func talk(peer *cryotest.Peer, n int, readsMeanwhile bool) (got echoed, err error) {
	frame := func(f wire.Frame) []byte {
		f.SID = peer.SID
		b, _ := wire.Append(nil, &f)
		return b
	}
	answers, sent := make(chan uint32, 10*n), make(chan error, 1)
	send := func() (err error) {
		for i := 0; i < n && err == nil; i++ {
			err = peer.WS.WriteMessage(websocket.BinaryMessage, frame(cryotest.Binary(uint32(i), fmt.Sprintf("%032d", i))))
		}
		return err
	}
	acknowledge := func() (err error) {
		for number := range answers {
			if err = peer.WS.WriteMessage(websocket.BinaryMessage, frame(cryotest.Acked(number))); err != nil {
				break
			}
		}
		return err
	}
	if !readsMeanwhile {
		if err := send(); err != nil {
			return got, err
		}
		send = func() error { return nil }
	}
	go func() {
		err := send()
		if err == nil {
			err = acknowledge()
		}
		sent <- err
	}()
	for got.acks+got.rejections < n && err == nil {
		var b []byte
		if _, b, err = peer.WS.ReadMessage(); err != nil {
			break
		}
		var f wire.Frame
		if f, err = wire.Parse(b); err != nil {
			break
		}
		switch f.Type {
		case wire.Ack:
			got.acks++
		case wire.Error:
			got.rejections++
		case wire.Binary:
			got.answers++
			answers <- f.Ack
		}
	}
	close(answers)
	if sendErr := <-sent; err == nil {
		err = sendErr
	}
	return got, err
}

func TestEchoFinishesForAClientThatReadsAfterSendingEverything(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 3355443" // a tenth of the default
		e.run(with(listenInput, settings), with(listenOutput, settings+", "+toTheSender))
		peer := e.unreadClient(t)
		begin := time.Now()
		got, err := talk(peer, 10_000, false)
		require.NoError(t, err)
		require.Equal(t, echoed{acks: 10_000, answers: 10_000}, got)
		require.Zero(t, time.Since(begin), "nothing waits")
	})
}

// More is outstanding than the receive buffer holds: the excess is rejected, the rest is
// answered, and nothing is sent twice because its acknowledgement was not read.
func TestEchoBeyondTheReceiveBufferRejectsTheExcessAndFinishes(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 1000000"
		e.run(with(listenInput, settings), with(listenOutput, settings+", "+toTheSender))
		peer := e.unreadClient(t)
		begin := time.Now()
		got, err := talk(peer, 20_000, true)
		require.NoError(t, err)
		require.Equal(t, 20_000, got.acks+got.rejections)
		require.Greater(t, got.acks, 1_000_000*8/9/(32+256)-10, "what can be held is delivered")
		require.Positive(t, got.rejections)
		require.Equal(t, got.acks, got.answers, "none is answered twice")
		require.Less(t, time.Since(begin), 12*time.Second, "of patience")
		e.log.want(t, "WARN Receive buffer full: rejecting")
	})
}

// It does not read, so it cannot be notified of the full buffer.
func TestClientThatOverfillsTheBufferAndNeverReadsLosesItsSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 1000000"
		e.run(with(listenInput, settings), with(listenOutput, settings+", ack_timeout: 1h, "+toTheSender))
		begin := time.Now()
		_, err := talk(e.unreadClient(t), 100_000, false)
		require.Error(t, err)
		require.Less(t, time.Since(begin), time.Minute)
		synctest.Wait()
		e.log.want(t, "peer timeout after 30s: the peer sends, but does not read acknowledgements")
	})
}

func TestEchoOverRealSocketsFinishes(t *testing.T) {
	defer checkLeaks(t)
	e := newEngine(t)
	addresses := make(chan net.Addr, 1)
	e.shared.listen = func(network, _ string) (net.Listener, error) {
		l, err := net.Listen(network, "127.0.0.1:0")
		if err == nil {
			addresses <- l.Addr()
		}
		return l, err
	}
	e.log.deaf = true // to what the engine says of each message
	p := e.start(listenInput, with(listenOutput, toTheSender))
	defer p.stop()
	peer := cryotest.DialPeer(t, websocket.DefaultDialer, "ws://"+next(t, addresses).String()+"/", token, 77)
	defer peer.WS.Close()
	handshake(t, peer)
	got, err := talk(peer, 100_000, false)
	require.NoError(t, err)
	require.Equal(t, 100_000, got.acks)
	require.GreaterOrEqual(t, got.answers, got.acks)
}

// What we don't read may be its acknowledgement.
func TestSessionWithPausedReadsIsNotClosedForALateAcknowledgement(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 10000"
		e.run(with(listenInput, settings), toProbe)
		e.run(fromOnce, with(listenOutput, settings+", ack_timeout: 3s"))
		client := e.rawClient()
		for i := range uint32(10) {
			client.WriteFrames(cryotest.Binary(i, strings.Repeat("x", 2000)))
		}
		synctest.Wait()
		f := e.produce("m")
		client.Ack(client.WantType("the broadcast", wire.UTF8))
		require.ErrorIs(t, next(t, f.verdict), errLate)
		e.deliverNext(10)
		acknowledged := make(map[uint32]bool) // in the order of the deliveries, which is any
		for len(acknowledged) < 10 {
			acknowledged[client.WantType("the session goes on", wire.Ack).Ack] = true
		}
	})
}

// A broadcast waits for its acknowledgement no longer than that, and isn't sent
// to everybody again.
func TestBroadcastIsDeliveredWhenOnlyASessionWithPausedReadsIsLate(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 10000"
		e.run(with(listenInput, settings), toProbe)
		e.run(fromFeed, with(listenOutput, settings+", ack_timeout: 3s"))
		client, other := e.rawClient(), e.dial()
		for i := range uint32(10) {
			client.WriteFrames(cryotest.Binary(i, strings.Repeat("x", 2000)))
		}
		synctest.Wait()
		begin := time.Now()
		f := e.produce("m")
		client.Ack(client.WantType("the broadcast", wire.UTF8))
		require.NoError(t, receiveTexts(t, other, "m")[0].Ack())
		f.wantDelivered(t, "one has acknowledged, and the other may have")
		require.Equal(t, 3*time.Second, time.Since(begin))
		wantNothing(t, other)
		client.WantIdle("neither the broadcast again nor an end", time.Second)
	})
}

// The same with synchronous responses, which need no output at either end.
func TestEchoWithSyncResponsesFinishesOrRejectsTheExcess(t *testing.T) {
	for name, c := range map[string]struct {
		messages int
		reads    bool
		rejects  bool
	}{
		"what can be held, of a peer that reads when it has sent everything": {3000, false, false},
		"more, of a peer that reads":                                         {20_000, true, true},
	} {
		test := func(t *testing.T, e *engine, peer *cryotest.Peer) {
			t.Helper()
			got, err := talk(peer, c.messages, c.reads)
			require.NoError(t, err)
			require.Equal(t, c.messages, got.acks+got.rejections)
			require.Equal(t, got.acks, got.answers, "none is answered twice")
			require.Equal(t, c.rejects, got.rejections > 0)
			require.GreaterOrEqual(t, got.acks, 3000)
		}
		const settings = "max_buffer_bytes: 1000000"
		t.Run(name+", dialled", func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := cryotest.NewServer(t)
				e.dialer = server.Dial
				p := e.start(with(dialInput, settings), "sync_response: {}")
				t.Cleanup(p.kill)
				peer := server.NextPeer()
				_, b, err := peer.WS.ReadMessage()
				require.NoError(t, err)
				info, err := wire.Parse(b)
				require.NoError(t, err)
				peer.WriteFrames(cryotest.EndpointInfo(0), cryotest.Acked(info.Ack))
				_, _, err = peer.WS.ReadMessage() // that ours was heard
				require.NoError(t, err)
				test(t, e, peer)
			})
		})
		t.Run(name+", accepted", func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, settings), "sync_response: {}")
				test(t, e, e.unreadClient(t))
			})
		})
	}
}
