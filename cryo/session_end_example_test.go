package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A stop that leaves nothing unsettled: what was received is delivered and acknowledged,
// and what comes later is left to the peer, which sends it again.
func ExampleSession_Drain() {
	received := make(chan *cryo.Message)
	server := listen(func(s *cryo.Session, _ *cryo.Upgrade) {
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return // drained, and closed
			}
			received <- m
		}
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	sent := make(chan error)
	go func() { sent <- s.SendBinary(ctx, []byte("an order")) }()

	m := <-received
	drained := make(chan error)
	go func() { drained <- m.Session().Drain(ctx, "restarting") }()
	fmt.Printf("%s\n", m.Payload)
	must(m.Ack())
	fmt.Println(<-drained, <-sent)
	<-s.Done()
	fmt.Println(s.Err())
	// Output:
	// an order
	// <nil> <nil>
	// session ended: closed by the peer: "restarting"
}

// CloseNow ends a session without BYE, such as one whose peer no longer answers.
func ExampleSession_CloseNow() {
	server := taker()
	defer server.Close()
	s := connectTo(server)

	must(s.CloseNow())
	fmt.Println(s.Err())
	// Output:
	// session ended: closed by this end
}

// Work for a session ends with it.
func ExampleSession_Context() {
	server := taker()
	defer server.Close()
	s := connectTo(server)

	work, cancel := context.WithTimeout(s.Context(), time.Hour)
	defer cancel()
	must(s.Close(context.Background(), ""))
	<-work.Done()
	fmt.Println(context.Cause(work))
	// Output:
	// session ended: closed by this end
}

// A session that is given up may have received messages that nobody will take.
func ExampleSession_Discard() {
	server := taker()
	defer server.Close()
	s := connectTo(server)

	must(s.Close(context.Background(), ""))
	s.Discard()
	fmt.Println(s.Stats().HeldBytes)
	// Output:
	// 0
}

// What an application makes of received data counts as received until it is released.
func ExampleSession_Reserve() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	defer s.CloseNow()

	records := strings.Repeat("record\n", 1000)
	release := s.Reserve(len(records))
	fmt.Println(s.Stats().HeldBytes)
	release()
	fmt.Println(s.Stats().HeldBytes)
	// Output:
	// 7000
	// 0
}

// Stats show a session whose peer takes nothing.
func ExampleSession_Stats() {
	server := listen(nil) // receives, and acknowledges nothing
	defer server.Close()
	s := connectTo(server)
	defer s.CloseNow()

	ctx, cancel := context.WithCancel(context.Background())
	sent := make(chan error)
	go func() { sent <- s.SendBinary(ctx, []byte("bytes")) }()
	for s.Stats().AwaitingAcks == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-sent
	fmt.Println(s.Stats().AwaitingAcks)
	// Output:
	// 0
}

// A session that only sends rejects what comes.
func ExampleSession_SetSendOnly() {
	server := listen(func(s *cryo.Session, _ *cryo.Upgrade) { s.SetSendOnly(true) })
	defer server.Close()
	s := connectTo(server)
	defer s.CloseNow()

	fmt.Println(s.SendBinary(context.Background(), []byte("bytes")))
	// Output:
	// rejected by the peer: "this session receives no messages"
}

// Redact removes the token from a text of the peer, for a log.
func ExampleSession_Redact() {
	server := taker()
	defer server.Close()
	s := connectTo(server)
	defer s.CloseNow()

	fmt.Println(s.Redact("the order 17 is no longer valid"))
	fmt.Println(s.Redact("the token secret is no longer valid"))
	fmt.Println(s.Redact("the token s%65cret is no longer valid"))
	// Output:
	// the order 17 is no longer valid
	// (redacted: 35 bytes)
	// (redacted: 37 bytes)
}

func ExampleNewServer() {
	_, err := cryo.NewServer(&cryo.ServerOptions{MaxSessions: -1})
	fmt.Println(err)
	// Output:
	// creating a server: MaxSessions is -1: it must be positive, or 0 for its default
}

// A server that stops lets what it has received be settled for a while, and closes then.
func ExampleServer_Drain() {
	server, err := cryo.NewServer(&cryo.ServerOptions{
		Authorize:    cryo.Tokens("secret"),
		OnSession:    func(*cryo.Session, *cryo.Upgrade) {}, // hand it to a worker
		OnSessionEnd: func(s *cryo.Session) { fmt.Println(s.Err()) },
	})
	must(err)
	httpServer := httptest.NewServer(server)
	defer httpServer.Close()
	s := connectTo(httpServer)

	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := server.Drain(ctx); errors.Is(err, context.DeadlineExceeded) {
		err = server.Shutdown(context.Background())
		must(err)
	}
	<-s.Done()
	fmt.Println(len(server.Sessions()))
	// Output:
	// session ended: closed by this end
	// 0
}
