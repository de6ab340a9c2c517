package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// taker serves sessions, and takes and prints the messages that come.
func taker() *httptest.Server {
	return httptest.NewServer(cryo.NewServer(cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"),
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) {
			for {
				m, err := s.Receive(context.Background())
				if err != nil {
					return // the session has ended
				}
				fmt.Printf("%v: %s\n", m.Kind, m.Payload)
				_ = m.Ack()
			}
		},
	}))
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
	server := httptest.NewServer(cryo.NewServer(cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"), // and nobody acknowledges anything
	}))
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

// The receiving end decides what is delivered, and says what is not.
func ExampleSession_Receive() {
	server := httptest.NewServer(cryo.NewServer(cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"),
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) {
			m, err := s.Receive(context.Background())
			if err != nil {
				return
			}
			_ = m.Reject("the disk is full")
		},
	}))
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	fmt.Println(s.SendText(ctx, "keep this"))
	// Output:
	// rejected by the peer: "the disk is full"
}

// A goodbye: what is queued is written, and the peer learns the reason.
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

// No goodbye: a context that is done cuts the connection at once.
func ExampleSession_Close_destroy() {
	server := taker()
	defer server.Close()
	s := connectTo(server)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	fmt.Println(s.Close(ctx, ""))
	// Output:
	// context canceled
}
