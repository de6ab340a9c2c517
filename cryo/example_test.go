package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A client sends a message, and knows that it was delivered when Send returns.
// Then it receives one, and acknowledges it once it is processed.
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

	if err := session.SendText(ctx, "hello"); err != nil {
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

// The error of a client that is denied has the reason.
func ExampleDial_denied() {
	server := startServer()
	defer server.stop()

	_, err := cryo.Dial(context.Background(), server.url, &cryo.DialOptions{Token: "wrong"})
	switch {
	case errors.Is(err, cryo.ErrSessionExists):
		fmt.Println("our last session, whose end the server notices within seconds")
	case errors.Is(err, cryo.ErrUnauthorized):
		fmt.Println("the token is wrong")
	}
	if denied, ok := errors.AsType[*cryo.HandshakeError](err); ok {
		fmt.Println(denied.StatusCode, denied.Message)
	}
	// Output:
	// the token is wrong
	// 401 The token was rejected.
}

// A server lets clients with a token in, and acknowledges a message when it has
// been delivered.
func ExampleServer() {
	delivered := make(chan string)
	server, err := cryo.NewServer(&cryo.ServerOptions{
		Authorize: cryo.Tokens("secret"),
		OnSession: func(session *cryo.Session, _ *cryo.Upgrade) {
			go func() {
				for message, err := range session.Messages(context.Background()) {
					if err != nil {
						return // the session has ended
					}
					delivered <- string(message.Payload)
					_ = message.Ack() // fails when the session has ended
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
	go func() { _ = client.SendText(context.Background(), "hello") }()
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

	err = session.SendBatch(ctx, []cryo.OutMessage{
		cryo.Text("one"),
		cryo.Text("not \xff text"),
		cryo.Binary([]byte("three")),
	})
	if failed, ok := errors.AsType[*cryo.BatchError](err); ok {
		for i, err := range failed.Errs {
			fmt.Println(i, err, errors.Is(err, cryo.ErrInvalidUTF8))
		}
	}
	// Output:
	// 0 <nil> false
	// 1 text of 10 bytes is not valid UTF-8: send it as binary true
	// 2 <nil> false
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
				for message, err := range session.Messages(context.Background()) {
					if err != nil {
						return
					}
					_ = message.Ack()
					go func() { _ = session.SendText(context.Background(), string(message.Payload)+" yourself") }()
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
