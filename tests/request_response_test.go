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
)

func TestRequestResponse(t *testing.T) {
	var requests atomic.Int32
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if requests.Add(1) == 1 {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, strings.ToUpper(string(body))+" for "+r.Header.Get("X-Cryo-Session"))
	}))
	defer service.Close()
	p := example(t, "request_response.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "HTTP_URL="+service.URL)
	address := p.wantLogged("Listening for Cryo clients on ")
	clients := []*cryo.Session{dial(t, address), dial(t, address)}
	for _, text := range []string{"one", "two"} {
		var asked []<-chan error
		for _, c := range clients {
			asked = append(asked, send(c, text))
		}
		for i, c := range clients {
			answer := receive(t, c)
			require.Equal(t, strings.ToUpper(text)+" for "+strconv.FormatUint(c.ID(), 10), string(answer.Payload))
			require.Equal(t, cryo.KindText, answer.Kind)
			wantPending(t, asked[i], "the answer is not acknowledged")
			require.NoError(t, answer.Ack())
			require.NoError(t, next(t, asked[i]))
		}
	}
	require.EqualValues(t, 5, requests.Load(), "two for each, and the one that failed")
	p.interrupt()
}
