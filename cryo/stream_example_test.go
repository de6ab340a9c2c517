package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// receiver serves one session, and prints the streams that come.
func receiver(setUp func(context.Context, *cryo.Session)) *httptest.Server {
	return listen(func(s *cryo.Session, u *cryo.Upgrade) {
		ctx := u.Request.Context()
		setUp(ctx, s)
		for st, err := range s.Streams(ctx) {
			if err != nil {
				return // the session has ended
			}
			printStream(st)
		}
	})
}

func printStream(st *cryo.IncomingStream) {
	defer st.Close() // does nothing after Ack
	data, err := io.ReadAll(st)
	if err != nil {
		log.Print(err) // not whole
		return
	}
	fmt.Printf("%s: %s\n", st.Name(), data)
	_ = st.Ack()
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func connectTo(server *httptest.Server) *cryo.Session {
	s, err := cryo.Dial(context.Background(), strings.Replace(server.URL, "http", "ws", 1), &cryo.DialOptions{Token: "secret"})
	must(err)
	return s
}

// All that a source has, with the acknowledgement that it was delivered.
func ExampleSession_SendStream() {
	server := receiver(func(context.Context, *cryo.Session) {})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	file := strings.NewReader("a file, or anything else that can be read")
	err := s.SendStream(ctx, file, &cryo.StreamOptions{Name: "report.txt"})
	must(err)
	fmt.Println("delivered")
	// Output:
	// report.txt: a file, or anything else that can be read
	// delivered
}

// What is larger than a message travels as a stream.
func ExampleErrTooLarge() {
	server := receiver(func(context.Context, *cryo.Session) {})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	err := s.SendBinary(ctx, make([]byte, cryo.MaxPayload+1))
	if errors.Is(err, cryo.ErrTooLarge) { // then SendStream can send it
		fmt.Println(err)
	}
	// Output:
	// message of 16777217 bytes is too large: one frame carries at most 16 MiB, send larger data as a stream
}

// Data that comes bit by bit. Without Finish the receiver never takes it for
// whole.
func ExampleSession_OpenStream() {
	server := receiver(func(context.Context, *cryo.Session) {})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	st, err := s.OpenStream(ctx, &cryo.StreamOptions{Name: "log"})
	must(err)
	defer st.Close() // abandons the stream, unless it is finished
	for _, part := range []string{"bit", " by", " bit"} {
		_, err := io.WriteString(st, part)
		must(err)
	}
	must(st.Finish())
	fmt.Println("delivered")
	// Output:
	// log: bit by bit
	// delivered
}

// A stream is acknowledged when it is safe, and not before.
func ExampleSession_AcceptStream() {
	server := listen(func(s *cryo.Session, u *cryo.Upgrade) {
		err := s.SendStream(u.Request.Context(), strings.NewReader("1,2\n3,4\n"), &cryo.StreamOptions{Name: "table.csv"})
		if err != nil {
			log.Print(err)
		}
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	st, err := s.AcceptStream(ctx, "table.csv")
	must(err)
	defer st.Close() // cancels the stream, unless it is acknowledged
	var file strings.Builder
	if _, err := io.Copy(&file, st); err != nil {
		return // what came is not the whole
	}
	must(st.Ack())
	fmt.Print(file.String())
	// Output:
	// 1,2
	// 3,4
}

// All streams of a session that have one of some names, one after the other.
func ExampleSession_Streams() {
	server := serveOnce(func(s *cryo.Session) {
		ctx := context.Background()
		for _, name := range []string{"a.csv", "b.csv"} {
			_ = s.SendStream(ctx, strings.NewReader("the contents of "+name), &cryo.StreamOptions{Name: name})
		}
		_ = s.Close(ctx, "that was all")
	})
	defer server.Close()
	s := connectTo(server)

	for st, err := range s.Streams(context.Background(), "a.csv", "b.csv") {
		if err != nil {
			fmt.Println(err)
			break // nothing more comes
		}
		printStream(st)
	}
	// Output:
	// a.csv: the contents of a.csv
	// b.csv: the contents of b.csv
	// session ended: closed by the peer: "that was all"
}

// A stream is whole if it ends with io.EOF, and not with any other error.
func ExampleIncomingStream_Read() {
	server := serveOnce(func(s *cryo.Session) {
		st, err := s.OpenStream(context.Background(), &cryo.StreamOptions{Name: "log"})
		if err == nil {
			_, _ = st.Write([]byte("the beginning"))
			_ = st.Close() // it is not finished
		}
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	st, err := s.AcceptStream(ctx)
	must(err)
	defer st.Close()
	st.SetIdleTimeout(10 * time.Millisecond)
	_, err = io.Copy(io.Discard, st) // st.Received() bytes; st.Size() were announced, -1 if none were; st.Tx() is the peer's number
	switch {
	case err == nil:
		must(st.Ack())
	case errors.Is(err, cryo.ErrStreamIdle):
		fmt.Println("the sender has stopped")
	case errors.Is(err, cryo.ErrStreamBroken):
		fmt.Println("a fault of the sender")
	case errors.Is(err, cryo.ErrBufferFull):
		fmt.Println("MaxBufferBytes of unacknowledged messages were received")
	case errors.Is(err, io.ErrUnexpectedEOF):
		fmt.Println("the session has ended")
	}
	// Output:
	// the sender has stopped
}

// A stream that is closed before it is read to its end is cancelled: its sender learns
// that it was not delivered.
func ExampleIncomingStream_Close() {
	server := listen(func(s *cryo.Session, u *cryo.Upgrade) {
		st, err := s.AcceptStream(u.Request.Context())
		must(err)
		defer st.Close()
		if st.Name() != "wanted" {
			return
		}
		printStream(st)
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	err := s.SendStream(ctx, strings.NewReader("data"), &cryo.StreamOptions{Name: "unwanted"})
	fmt.Println(errors.Is(err, cryo.ErrStreamCancelled))
	// Output:
	// true
}

// A stream without Finish is not delivered, and Close returns an error.
func ExampleOutgoingStream_Close() {
	server := receiver(func(context.Context, *cryo.Session) {})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	st, err := s.OpenStream(ctx, &cryo.StreamOptions{Name: "half"})
	must(err)
	_, err = io.WriteString(st, "not all of i")
	must(err)
	fmt.Println(st.Close())
	// Output:
	// the stream "half" is not finished: the stream is closed
}

// A receiver that pulls knows each stream's size from the start, and gets a
// chunk when it wants one.
func ExampleSession_PullStreams() {
	server := receiver(func(ctx context.Context, s *cryo.Session) {
		must(s.PullStreams(ctx))
		_ = s.SendText(ctx, "I pull") // so that the client begins then
	})
	defer server.Close()
	s := connectTo(server)
	ctx := context.Background()
	defer s.Close(ctx, "")

	m, err := s.Receive(ctx)
	must(err)
	_ = m.Ack()
	must(s.SendStream(ctx, strings.NewReader("piece by piece"), &cryo.StreamOptions{Name: "slow", ChunkBytes: 5}))

	pipe, _ := io.Pipe() // has no size, and can't be read by index
	err = s.SendStream(ctx, pipe, nil)
	fmt.Println(errors.Is(err, cryo.ErrNotSeekable))
	_, err = s.OpenStream(ctx, nil)
	fmt.Println(errors.Is(err, cryo.ErrPeerPulls))
	// Output:
	// slow: piece by piece
	// true
	// true
}
