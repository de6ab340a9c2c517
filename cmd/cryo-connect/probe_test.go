package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestProbe(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ready" {
			http.Error(w, "input not connected", http.StatusServiceUnavailable)
		}
	}))
	require.NoError(t, probe(t.Context(), service.URL+"/ping"))
	require.EqualError(t, probe(t.Context(), service.URL+"/ready"),
		service.URL+"/ready answers 503 Service Unavailable: input not connected")
	service.Close()
	require.ErrorContains(t, probe(t.Context(), service.URL+"/ping"), "connection refused")
}
