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
