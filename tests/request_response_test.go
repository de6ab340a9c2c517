package tests

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestServiceResponseIsSentToItsRequester(t *testing.T) {
	var requests atomic.Int32
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if requests.Add(1) == 1 {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, strings.ToUpper(string(body))+" for "+r.Header.Get("X-Cryo-Session"))
	}))
	defer service.Close()
	p := example(t, "request_response.yaml", "HTTP_URL="+service.URL)
	address := p.Listening()
	clients := []*cryo.Session{testkit.Dial(t, address), testkit.Dial(t, address)}
	for _, text := range []string{"one", "two"} {
		var sent []<-chan error
		for _, c := range clients {
			sent = append(sent, testkit.Send(c, text))
		}
		for i, c := range clients {
			reply := testkit.Receive(t, c)
			require.Equal(t, strings.ToUpper(text)+" for "+strconv.FormatUint(c.ID(), 10), string(reply.Payload))
			require.Equal(t, cryo.KindText, reply.Kind)
			testkit.WantPending(t, sent[i], "the reply is not acknowledged")
			require.NoError(t, reply.Ack())
			require.NoError(t, testkit.Next(t, sent[i]))
		}
	}
	require.EqualValues(t, 5, requests.Load(), "two for each client, and one that failed")
	p.Interrupt()
}
