package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Send connects when it must, and returns when the messages are acknowledged, on whichever
// session.
func ExampleClient() {
	server := startServer()
	defer server.stop()

	client, err := cryo.NewClient(server.url, &cryo.ClientOptions{
		DialOptions: cryo.DialOptions{Token: "secret"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close(context.Background(), "done")

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, text := range []string{"one", "two"} {
		err := client.Send(ctx, []cryo.OutMessage{cryo.Text(text)})
		if err != nil {
			fmt.Println(err) // the server rejected it, or it has not acknowledged it in a minute
			return
		}
		fmt.Println("the server has", text)
		client.Session().Close(ctx, "as if it were lost")
	}
	// Output:
	// the server has one
	// the server has two
}

// Messages are received from one session after the other.
func ExampleClient_Await() {
	server := startServer() // which answers each message
	defer server.stop()
	ctx := context.Background()
	client, _ := cryo.NewClient(server.url, &cryo.ClientOptions{
		DialOptions: cryo.DialOptions{Token: "secret"},
	})

	received := make(chan string)
	go func() {
		for {
			session, err := client.Await(ctx)
			if err != nil {
				return // the client is closed
			}
			for {
				message, err := session.Receive(ctx)
				if err != nil {
					break // all that the session had received is taken
				}
				received <- string(message.Payload)
				_ = message.Ack() // fails after the session's end; then the server sends it again
			}
		}
	}()

	for _, text := range []string{"hello", "hello again"} {
		if err := client.Send(ctx, []cryo.OutMessage{cryo.Text(text)}); err != nil {
			fmt.Println(err)
		}
		fmt.Println(<-received)
		client.Session().Close(ctx, "as if it were lost")
	}
	client.Close(ctx, "done")
	// Output:
	// hello yourself
	// hello again yourself
}

// A caller that decides for itself how long to go on.
func ExampleClient_Connect() {
	server := startServer()
	defer server.stop()
	ctx := context.Background()
	client, _ := cryo.NewClient(server.url, &cryo.ClientOptions{
		DialOptions: cryo.DialOptions{Token: "wrong"},
	})
	defer client.Close(ctx, "done")

	_, err := client.Connect(ctx)
	if retry, ok := errors.AsType[*cryo.RetryError](err); ok {
		fmt.Println("the next call would wait", retry.After)
	}
	if errors.Is(err, cryo.ErrUnauthorized) {
		fmt.Println("the token is wrong")
	}
	// Output:
	// the next call would wait 30s
	// the token is wrong
}

// A token that expires is asked for at each attempt, and each session is seen.
func ExampleClientOptions() {
	server := startServer()
	defer server.stop()
	ctx := context.Background()
	client, err := cryo.NewClient(server.url, &cryo.ClientOptions{
		BeforeDial: func(_ context.Context, options *cryo.DialOptions) error {
			fmt.Println("asked for a token")
			options.Token = "secret"
			return nil
		},
		OnSession:    func(*cryo.Session) { fmt.Println("connected") },
		OnSessionEnd: func(session *cryo.Session) { fmt.Println(session.Err()) },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	for range 2 {
		session, err := client.Connect(ctx)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("the same session:", client.Session() == session)
		session.Close(ctx, "as if it were lost")
	}
	client.Close(ctx, "done")
	// Output:
	// asked for a token
	// connected
	// the same session: true
	// session ended: closed by this end
	// asked for a token
	// connected
	// the same session: true
	// session ended: closed by this end
}
