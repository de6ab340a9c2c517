package cryo_test

import (
	"context"
	"net/http"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestOnLateAckIsCalledWithTheSession(t *testing.T) {
	late := 0
	var of *cryo.Session
	opts := cryo.SessionOptions{OnLateAck: func(s *cryo.Session) { late, of = late+1, s }}
	atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		late = 0
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		batch := []cryo.OutMessage{{Kind: cryo.KindText}, {Kind: cryo.KindText}, {Kind: cryo.KindText}}
		require.Error(t, s.SendBatch(ctx, batch))
		for range batch {
			peer.WantType("a text", wire.UTF8)
		}
		peer.WriteFrames(
			cryotest.Acked(end.first),
			cryotest.Acked(end.first), // again
			cryotest.Error(end.first+2, "no"),
			cryotest.Acked(end.first+3), // never sent
			cryotest.Acked(end.first-1), // of the handshake
		)
		synctest.Wait()
		require.Equal(t, 2, late, "one acknowledgement and one rejection of what was given up")
		require.Same(t, s, of)

		timely := start(func() error { return s.SendText(t.Context(), "") })
		peer.WriteFrames(cryotest.Acked(peer.WantType("the text", wire.UTF8).Ack))
		timely.wantSuccess(t)
		require.Equal(t, 2, late)
	})
}

func TestOnRejectIsCalledWithTheSession(t *testing.T) {
	var (
		rejected []cryo.Kind
		by       *cryo.Session
	)
	opts := cryo.SessionOptions{SendOnly: true, OnReject: func(s *cryo.Session, kind cryo.Kind) {
		rejected, by = append(rejected, kind), s
	}}
	atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		rejected = nil
		peer.WriteFrames(
			cryotest.Text(1, ""), cryotest.Binary(2, ""), cryotest.Error(3, ""),
			wire.Frame{SID: sid, Type: wire.TxStart, Ack: 4, Tx: 1, Size: -1},
		)
		synctest.Wait()
		require.Equal(t, []cryo.Kind{cryo.KindText, cryo.KindBinary, cryo.KindError, cryo.KindStream}, rejected)
		require.Same(t, s, by)
	})
}

func TestOnRejectIsCalledForAFullReceiveBuffer(t *testing.T) {
	opts := smallBuffer
	var rejected []cryo.Kind
	opts.OnReject = func(_ *cryo.Session, kind cryo.Kind) { rejected = append(rejected, kind) }
	atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		rejected = nil
		fill(t, s, peer) // one message more waits than the receive buffer has capacity for
		answer := start(func() error { return s.SendText(t.Context(), "the answer") })
		peer.Ack(peer.WantType("the answer", wire.UTF8))
		require.NoError(t, <-answer.done) // it takes rejectAfter
		require.Equal(t, []cryo.Kind{cryo.KindText}, rejected)
	})
}

func TestMessageHasItsReceiveTime(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		time.Sleep(time.Second)
		peer.WriteFrames(cryotest.Text(1, "hello"))
		synctest.Wait()
		read := time.Now()
		time.Sleep(time.Second)
		require.Equal(t, read, receive(t, s).Time(), "and not when it was taken")
	})
}

func TestOnSessionEndFollowsEachOnSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended []*cryo.Session
		_, l, sessions := serve(t, cryo.ServerOptions{
			HandshakeTimeout: time.Second,
			OnSessionEnd: func(s *cryo.Session) {
				require.Error(t, s.Err())
				ended = append(ended, s)
			},
		})
		join(t, l, sid+1) // sends nothing
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, sessions)
		time.Sleep(time.Minute)
		require.Empty(t, ended, "one was no session yet, the other lives")
		cut(s)
		synctest.Wait() // OnSessionEnd follows Done
		require.Equal(t, []*cryo.Session{s}, ended)
	})
}

func TestOnDenyIsCalledWithTheStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var statuses []int
		_, l, _ := serve(t, cryo.ServerOptions{OnDeny: func(status int) { statuses = append(statuses, status) }})
		knock(t, l, "x-cryo-sid=1;", upgrade())
		knock(t, l, "x-cryo-sid=1", upgrade())
		knock(t, l, "", http.Header{}) // no client
		handshake := upgrade()
		handshake.Set("Sec-Websocket-Version", "12")
		status, header, body := knock(t, l, "x-cryo-sid=1&authorization=Bearer+"+url.QueryEscape(token), handshake)
		require.Equal(t, 400, status)
		require.Equal(t, "13", header.Get("Sec-Websocket-Version"))
		require.Contains(t, body, "The upgrade must have one header Sec-WebSocket-Version: 13.")
		require.Equal(t, []int{400, 401, 400}, statuses)
	})
}
