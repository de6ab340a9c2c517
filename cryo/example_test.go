package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"strings"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A client sends a message, and knows that it was delivered when Send returns.
// Then it receives one, and says so when it has dealt with it.
func ExampleDial() {
	server := startServer()
	defer server.stop()

	ctx := context.Background()
	session, err := cryo.Dial(ctx, server.url, &cryo.DialOptions{Token: "secret"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer session.Close(ctx, "done")

	if err := session.SendUTF8(ctx, "hello"); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("the server has it")

	message, err := session.Receive(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s\n", message.Payload)
	if err := message.Ack(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// the server has it
	// hello yourself
}

// A client that is refused can tell why.
func ExampleDial_refused() {
	server := startServer()
	defer server.stop()

	_, err := cryo.Dial(context.Background(), server.url, &cryo.DialOptions{Token: "wrong"})
	switch {
	case errors.Is(err, cryo.ErrSessionExists):
		fmt.Println("our own ghost, gone in a second")
	case errors.Is(err, cryo.ErrUnauthorized):
		fmt.Println("a wrong token, which takes a while to put right")
	}
	// Output:
	// a wrong token, which takes a while to put right
}

// A server lets clients with a token in, and acknowledges a message when it has
// been delivered.
func ExampleServer() {
	delivered := make(chan string)
	server, err := cryo.NewServer(&cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"),
		OnSession: func(session *cryo.Session, _ *cryo.Upgrade) {
			go func() {
				for {
					message, err := session.Receive(context.Background())
					if errors.Is(err, net.ErrClosed) {
						return // the session is over
					}
					delivered <- string(message.Payload)
					_ = message.Ack() // fails when the session is over
				}
			}()
		},
	})
	if err != nil {
		fmt.Println(err) // an option is wrong
		return
	}
	httpServer := httptest.NewServer(server) // any http.Server will do
	defer httpServer.Close()
	defer server.Shutdown(context.Background())

	url := strings.Replace(httpServer.URL, "http", "ws", 1)
	client, err := cryo.Dial(context.Background(), url, &cryo.DialOptions{Token: "secret"})
	if err != nil {
		fmt.Println(err)
		return
	}
	go func() { _ = client.SendUTF8(context.Background(), "hello") }()
	fmt.Println(<-delivered)
	// Output:
	// hello
}

// Many messages travel together, and the error names those that failed.
func ExampleSession_SendBatch() {
	server := startServer()
	defer server.stop()

	ctx := context.Background()
	session, err := cryo.Dial(ctx, server.url, &cryo.DialOptions{Token: "secret"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer session.Close(ctx, "done")

	err = session.SendBatch(ctx, []cryo.Outgoing{
		{Kind: cryo.KindText, Payload: []byte("one")},
		{Kind: cryo.KindText, Payload: []byte("not \xff text")},
		{Kind: cryo.KindBinary, Payload: []byte("three")},
	})
	if failed, ok := errors.AsType[*cryo.BatchError](err); ok {
		for i, err := range failed.Errs {
			fmt.Println(i, err)
		}
	}
	// Output:
	// 0 <nil>
	// 1 text of 10 bytes is not valid UTF-8: send it as binary
	// 2 <nil>
}

type exampleServer struct {
	url  string
	stop func()
}

// startServer starts a server that answers messages.
func startServer() exampleServer {
	server, err := cryo.NewServer(&cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"),
		OnSession: func(session *cryo.Session, _ *cryo.Upgrade) {
			go func() {
				for {
					message, err := session.Receive(context.Background())
					if err != nil {
						return
					}
					_ = message.Ack()
					go func() { _ = session.SendUTF8(context.Background(), string(message.Payload)+" yourself") }()
				}
			}()
		},
	})
	must(err)
	httpServer := httptest.NewServer(server)
	return exampleServer{strings.Replace(httpServer.URL, "http", "ws", 1), func() {
		httpServer.Close()
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = server.Shutdown(ctx)
	}}
}
