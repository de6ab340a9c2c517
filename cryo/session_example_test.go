package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptest"
	"sync/atomic"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// listen serves sessions to clients that have the token "secret".
func listen(onSession func(*cryo.Session, *cryo.Upgrade)) *httptest.Server {
	server, err := cryo.NewServer(&cryo.ServerOptions{Authorize: cryo.Tokens("secret"), OnSession: onSession})
	must(err)
	return httptest.NewServer(server)
}

// taker serves sessions, and prints and acknowledges the messages that are received.
func taker() *httptest.Server {
	return listen(func(s *cryo.Session, _ *cryo.Upgrade) {
		for m, err := range s.Messages(context.Background()) {
			if err != nil {
				return // the session has ended
			}
			fmt.Printf("%v: %s\n", m.Kind, m.Payload)
			_ = m.Ack()
		}
	})
}

// serveOnce serves each session by a function.
func serveOnce(serve func(s *cryo.Session)) *httptest.Server {
	return listen(func(s *cryo.Session, _ *cryo.Upgrade) { serve(s) })
}

func ExampleSession_SendText() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	must(s.SendText(ctx, "grüße"))
	fmt.Println("delivered")
	// Output:
	// text: grüße
	// delivered
}

func ExampleSession_SendBinary() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	must(s.SendBinary(ctx, []byte("bytes")))
	fmt.Println("delivered")
	// Output:
	// binary: bytes
	// delivered
}

// The same messages for several sessions: they are queued for each, and then awaited, so a
// slow session delays no other. The payloads are not copied.
func ExampleSession_Queue() {
	server := taker()
	defer server.Close()
	sessions := []*cryo.Session{connectTo(server), connectTo(server)}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	messages := []cryo.OutMessage{cryo.Text("news")}
	var pending []*cryo.Pending
	for _, s := range sessions {
		pending = append(pending, s.Queue(messages))
	}
	for i, s := range sessions {
		if err := pending[i].Wait(ctx); err != nil {
			fmt.Println(s.ID(), err)
		}
		must(s.Close(ctx, ""))
	}
	fmt.Println("delivered")
	// Output:
	// text: news
	// text: news
	// delivered
}

// A message that is not wanted any more is withdrawn. Its memory may be used again when Done
// is closed.
func ExamplePending_Cancel() {
	server := serveOnce(func(*cryo.Session) {}) // it acknowledges nothing
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	payload := []byte("temperature: 20")
	pending := s.Queue([]cryo.OutMessage{cryo.Binary(payload)})
	select {
	case <-pending.Done():
	case <-time.After(10 * time.Millisecond):
		pending.Cancel()
		<-pending.Done()
	}
	copy(payload, "temperature: 21")
	fmt.Println(pending.Wait(ctx))
	// Output:
	// waiting for the acknowledgement: context canceled
}

// An acknowledgement is late after 30 s, in which a slow line does not count that still
// transfers the message.
func ExampleSession_AckClock() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	pending := s.Queue([]cryo.OutMessage{cryo.Binary([]byte("a large picture"))})
	clock := s.AckClock()
	ticker := time.NewTicker(30 * time.Second / 2)
	defer ticker.Stop()
	for done := false; !done; {
		select {
		case <-pending.Done():
			done = true
		case <-ticker.C:
			if done = clock.Tick(); done {
				pending.Cancel()
			}
		}
	}
	must(pending.Wait(ctx))
	fmt.Println("delivered")
	// Output:
	// binary: a large picture
	// delivered
}

// All messages of a session: each is acknowledged when it is delivered, and not before.
func ExampleSession_Messages() {
	server := serveOnce(func(s *cryo.Session) {
		_ = s.SendBatch(context.Background(), []cryo.OutMessage{cryo.Text("one"), cryo.Text("two")})
		_ = s.Close(context.Background(), "that was all")
	})
	defer server.Close()
	s := connectTo(server)

	for m, err := range s.Messages(context.Background()) {
		if err != nil {
			fmt.Println(err)
			break // nothing more comes
		}
		if m.Kind == cryo.KindText && time.Since(m.Time()) < time.Hour {
			fmt.Printf("%s\n", m.Payload)
		}
		must(m.Ack())
	}
	// Output:
	// one
	// two
	// session ended: closed by the peer: "that was all"
}

// Messages that are delivered together are acknowledged together.
func ExampleSession_ReceiveBatch() {
	server := serveOnce(func(s *cryo.Session) {
		ctx := context.Background()
		var stored []*cryo.Message
		for len(stored) < 3 {
			batch, err := s.ReceiveBatch(ctx, 100)
			if err != nil {
				return // the session has ended
			}
			stored = append(stored, batch...)
		}
		_ = cryo.AckBatch(stored)
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	must(s.SendBatch(ctx, []cryo.OutMessage{cryo.Text("a"), cryo.Text("b"), cryo.Binary([]byte("c"))}))
	fmt.Println("delivered")
	// Output:
	// delivered
}

// What can't be delivered is rejected, with a text for the sender.
func ExampleMessage_Reject() {
	server := serveOnce(func(s *cryo.Session) {
		m, err := s.Receive(context.Background())
		if err != nil {
			return
		}
		_ = m.Reject("the disk is full")
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	err := s.SendText(ctx, "keep this")
	if rejected, ok := errors.AsType[*cryo.RejectedError](err); ok {
		fmt.Println(rejected.Text)
	}
	// Output:
	// the disk is full
}

// Why a session has ended decides about what to do next.
func ExampleSession_Err() {
	server := serveOnce(func(s *cryo.Session) { _ = s.Close(context.Background(), "maintenance") })
	defer server.Close()
	s := connectTo(server)
	<-s.Done()

	var (
		closed *cryo.PeerClosedError
		broken *cryo.ProtocolError
	)
	err := s.Err()
	switch {
	case errors.As(err, &closed):
		fmt.Println("closed by the server:", closed.Reason) // and with closed.Code
	case errors.As(err, &broken):
		fmt.Println("a fault of the server:", broken.Problem)
	case errors.Is(err, cryo.ErrPeerTimeout):
		fmt.Println("the server, or the line to it, is down")
	case errors.Is(err, cryo.ErrReceiveTimeout):
		fmt.Println("a message was too large for the line")
	case errors.Is(err, cryo.ErrTakenOver):
		fmt.Println("at a server: its client has another session now")
	case errors.Is(err, cryo.ErrClosed):
		fmt.Println("we have closed it")
	default:
		fmt.Println("connection lost:", err)
	}
	// Output:
	// closed by the server: maintenance
}

// The hooks of a session are for counting.
func ExampleSessionOptions() {
	var rejected, late atomic.Int64
	handler, err := cryo.NewServer(&cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"),
		SessionOptions: cryo.SessionOptions{
			SendOnly:  true,
			OnReject:  func(_ *cryo.Session, kind cryo.Kind) { rejected.Add(1) },
			OnLateAck: func(*cryo.Session) { late.Add(1) },

			// Zero values are these defaults.
			HeartbeatInterval: cryo.DefaultHeartbeatInterval,
			MaxBufferBytes:    cryo.DefaultMaxBufferBytes,
			StreamIdleTimeout: cryo.DefaultStreamIdleTimeout,
			CloseTimeout:      cryo.DefaultCloseTimeout,
			Logger:            slog.New(slog.DiscardHandler),
		},
	})
	must(err)
	server := httptest.NewServer(handler)
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	fmt.Println(s.SendText(ctx, "hello"))
	fmt.Println(rejected.Load(), late.Load())
	// Output:
	// rejected by the peer: "this session receives no messages"
	// 1 0
}

// A close handshake: queued frames are written, and the peer receives the reason.
func ExampleSession_Close() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()

	must(s.Close(ctx, "that was all"))
	err := s.SendText(ctx, "too late")
	fmt.Println(err, errors.Is(err, cryo.ErrClosed), errors.Is(err, net.ErrClosed))
	// Output:
	// session ended: closed by this end true true
}
