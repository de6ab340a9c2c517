package tests

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestTraceSpansThePipeline(t *testing.T) {
	const (
		trace  = "0af7651916cd43dd8448eb211c80319c"
		sender = "b7ad6b7169203331"
	)
	reports := make(chan []byte, 100)
	jaeger := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			reports <- body
		}
	}))
	t.Cleanup(jaeger.Close)
	server := testkit.Serve(t)
	p := example(t, "traces.yaml", "CRYO_URL="+server.URL(), "JAEGER_URL="+jaeger.URL)
	session := server.Session(t)

	done := testkit.Send(testkit.Dial(t, p.Listening()), `{"id":1,"trace":{"traceparent":"00-`+trace+`-`+sender+`-01"}}`)
	m := testkit.Receive(t, session)
	var content struct {
		ID    int
		Trace struct{ Traceparent string }
	}
	require.NoError(t, json.Unmarshal(m.Payload, &content))
	require.Equal(t, 1, content.ID)
	require.Regexp(t, "^00-"+trace+"-[0-9a-f]{16}-01$", content.Trace.Traceparent, "the same trace")
	require.NotContains(t, content.Trace.Traceparent, sender, "with a span of the pipeline")
	require.NoError(t, m.Ack())
	require.NoError(t, testkit.Next(t, done))

	// Jaeger receives the trace and the sender's span; Thrift's integers are big-endian.
	id, err := hex.DecodeString(trace)
	require.NoError(t, err)
	parent, err := hex.DecodeString(sender)
	require.NoError(t, err)
	var report []byte
	for _, want := range [][]byte{id[:8], id[8:], parent} {
		for !bytes.Contains(report, want) {
			report = append(report, testkit.Next(t, reports)...)
		}
	}
}
