package testkit

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Response is what [HTTP] received.
type Response struct {
	Status int
	Header http.Header
	Body   string
}

// HTTP makes a request on its own connection. The error is that of the connection:
// a program that does not listen yet, for example.
func HTTP(method, url, body string) (Response, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return Response{}, err
	}
	return Do(http.DefaultTransport, req)
}

// Do is [HTTP] with a transport and a request of the test's own.
func Do(transport http.RoundTripper, req *http.Request) (Response, error) {
	req.Close = true // leaves no idle connection behind
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return Response{}, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return Response{resp.StatusCode, resp.Header, string(content)}, err
}

// WebService is an HTTP service that waits with each request until the test responds to
// it. Its listener can be taken down.
type WebService struct {
	*Listener
	URL      string
	Requests chan *Request // as they are received
	tb       testing.TB
}

// Request is a request to a [WebService].
type Request struct {
	Method, Body string
	Header       http.Header
	status       chan int
}

// NewWebService runs a service until the test's end.
func NewWebService(tb testing.TB) *WebService {
	tb.Helper()
	s := &WebService{Listener: NewListener(Listen(tb)), Requests: make(chan *Request, 10_000), tb: tb}
	ended := make(chan struct{})
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		request := &Request{r.Method, string(body), r.Header, make(chan int, 1)}
		s.Requests <- request
		select {
		case status := <-request.status:
			w.WriteHeader(status)
		case <-r.Context().Done():
		case <-ended:
		}
	}))
	_ = server.Listener.Close()
	server.Listener = s.Listener
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Start()
	tb.Cleanup(func() {
		close(ended)
		server.Close()
	})
	s.URL = server.URL
	return s
}

// Next waits for the next request.
func (s *WebService) Next() *Request {
	s.tb.Helper()
	return Next(s.tb, s.Requests)
}

// Respond responds to the request with a status.
func (r *Request) Respond(status int) { r.status <- status }

// RespondToAll responds to all further requests with a status.
func (s *WebService) RespondToAll(status int) {
	ctx := s.tb.Context()
	go func() {
		for {
			select {
			case r := <-s.Requests:
				r.Respond(status)
			case <-ctx.Done():
				return
			}
		}
	}()
}
