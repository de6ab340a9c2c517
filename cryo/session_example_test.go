package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// listen serves sessions to clients that have the token "secret".
func listen(onSession func(*cryo.Session, *cryo.Upgrade)) *httptest.Server {
	server, err := cryo.NewServer(&cryo.ServerOptions{Authorize: cryo.Tokens("secret"), OnSession: onSession})
	must(err)
	return httptest.NewServer(server)
}

// taker serves sessions, and takes and prints the messages that come.
func taker() *httptest.Server {
	return listen(func(s *cryo.Session, _ *cryo.Upgrade) {
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return // the session has ended
			}
			fmt.Printf("%v: %s\n", m.Kind, m.Payload)
			_ = m.Ack()
		}
	})
}

func ExampleSession_SendUTF8() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	must(s.SendUTF8(ctx, "grüße"))
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

// The receiving end decides what is delivered, and says what is not.
func ExampleSession_Receive() {
	server := listen(func(s *cryo.Session, _ *cryo.Upgrade) {
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

	fmt.Println(s.SendUTF8(ctx, "keep this"))
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
	err := s.SendUTF8(ctx, "too late")
	fmt.Println(err, errors.Is(err, cryo.ErrClosed), errors.Is(err, net.ErrClosed))
	// Output:
	// session ended: closed by this end true true
}
