package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A configuration can be checked before anything is dialled.
func ExampleCheckURL() {
	fmt.Println(cryo.CheckURL("wss://cryo.example.com/feed?tenant=7"))
	fmt.Println(cryo.CheckURL("https://cryo.example.com"))
	// Output:
	// <nil>
	// the scheme is "https": it must be ws or wss
}

// A client that connects again uses the id that it had.
func ExampleNewSessionID() {
	server := taker()
	defer server.Close()
	ctx := context.Background()
	options := &cryo.DialOptions{Token: "secret", SessionID: cryo.NewSessionID()}
	url := strings.Replace(server.URL, "http", "ws", 1)

	for range 2 {
		s, err := cryo.Dial(ctx, url, options)
		must(err)
		fmt.Println(s.ID() == options.SessionID)
		must(s.Close(ctx, ""))
	}
	// Output:
	// true
	// true
}

// A client with the right token is denied for another reason, with its own message.
// Value keeps what was found out about the others.
func ExampleAdmissionError() {
	server, err := cryo.NewServer(&cryo.ServerOptions{
		Authorize: func(u *cryo.Upgrade) error {
			switch tenant := u.Request.URL.Query().Get("tenant"); {
			case u.Token != "secret":
				return errors.New("unknown token")
			case tenant == "":
				return &cryo.AdmissionError{StatusCode: http.StatusForbidden, Message: "Name a tenant."}
			default:
				u.Value = tenant
				return nil
			}
		},
		OnSession: func(s *cryo.Session, u *cryo.Upgrade) {
			fmt.Println(s.Value(), u.SessionID == s.ID(), s.RemoteAddr() != nil)
		},
	})
	must(err)
	web := httptest.NewServer(server) // a Server is an http.Handler: ServeHTTP upgrades requests
	defer web.Close()
	url := strings.Replace(web.URL, "http", "ws", 1)
	ctx := context.Background()

	_, err = cryo.Dial(ctx, url, &cryo.DialOptions{Token: "secret"})
	denied, _ := errors.AsType[*cryo.HandshakeError](err)
	fmt.Println(denied.StatusCode, denied.Message, denied.RetryAfter)

	s, err := cryo.Dial(ctx, url+"?tenant=seven", &cryo.DialOptions{Token: "secret"})
	must(err)
	must(s.Close(ctx, ""))
	must(server.Shutdown(ctx))
	// Output:
	// 403 Name a tenant. 0s
	// seven true true
}

// The kinds of what is received, and the peer's number of each, which logs of both ends
// have in common.
func ExampleKind() {
	server := serveOnce(func(s *cryo.Session) {
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return
			}
			switch m.Kind {
			case cryo.KindText:
				fmt.Printf("text %q\n", m.Payload)
			case cryo.KindBinary:
				fmt.Printf("%d bytes\n", len(m.Payload))
			case cryo.KindError: // the application of the peer reports an error
			case cryo.KindStream: // only OnReject has it: streams are no messages
			}
			fmt.Println(m.Number() != 0)
			_ = m.Ack()
		}
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	must(s.SendText(ctx, "hello"))
	must(s.SendBinary(ctx, []byte{1, 2, 3}))
	// Output:
	// text "hello"
	// true
	// 3 bytes
	// true
}

// A stream whose receiver takes too long for a step ends with ErrStepTimeout. A peer that
// does not support streams would be ErrStreamsUnsupported, and one that cancels
// ErrStreamCancelled.
func ExampleStreamOptions() {
	server := serveOnce(func(s *cryo.Session) { <-s.Done() }) // it accepts no stream
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	_, err := s.OpenStream(ctx, &cryo.StreamOptions{Name: "log", StepTimeout: 20 * time.Millisecond})
	fmt.Println(errors.Is(err, cryo.ErrStepTimeout), errors.Is(err, cryo.ErrStreamsUnsupported))
	// Output:
	// true false
}

// A reader is sent as it comes, each of its reads as a chunk. Nothing can be sent after
// Finish.
func ExampleOutgoingStream_ReadFrom() {
	server := receiver(func(context.Context, *cryo.Session) {})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	stream, err := s.OpenStream(ctx, &cryo.StreamOptions{Name: "lines"})
	must(err)
	defer stream.Close()
	n, err := stream.ReadFrom(strings.NewReader("one, two"))
	must(err)
	must(stream.Finish())
	_, err = stream.Write([]byte("three"))
	fmt.Println(n, errors.Is(err, cryo.ErrStreamClosed))
	// Output:
	// lines: one, two
	// 8 true
}
