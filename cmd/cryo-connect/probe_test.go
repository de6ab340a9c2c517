package main

import (
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestProbeFailsUnlessTheStatusIsSuccess(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ready" {
			http.Error(w, "input not connected", http.StatusServiceUnavailable)
		}
	}))
	require.NoError(t, probe(t.Context(), service.URL+"/ping"))
	err := probe(t.Context(), service.URL+"/ready")
	require.ErrorContains(t, err, "503")
	require.ErrorContains(t, err, "input not connected", "the body has the reason")
	service.Close()
	require.ErrorIs(t, probe(t.Context(), service.URL+"/ping"), syscall.ECONNREFUSED)
}

func TestProbeRequestsLocalhostByDefault(t *testing.T) {
	for address, want := range map[string]string{
		"127.0.0.1:4195": "http://127.0.0.1:4195/ping",
		"0.0.0.0:4195":   "http://127.0.0.1:4195/ping",
		":4196":          "http://127.0.0.1:4196/ping",
		"[::]:4195":      "http://127.0.0.1:4195/ping",
		"[::1]:4195":     "http://[::1]:4195/ping",
		"10.0.0.1:80":    "http://10.0.0.1:80/ping",
		"localhost:4195": "http://localhost:4195/ping",
	} {
		require.Equal(t, want, pingURL(address), address)
	}
}
