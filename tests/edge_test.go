package tests

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// certify writes a certificate, which is its own authority, and its key, and
// gives the configuration of a client that trusts it.
func certify(t testing.TB, certFile, keyFile string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "EC PRIVATE KEY", Bytes: keyDER}} {
		require.NoError(t, os.WriteFile(path+".new", pem.EncodeToMemory(block), 0o600))
		require.NoError(t, os.Rename(path+".new", path))
	}
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

func TestCryoServerTLS(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile, messages := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "messages.txt")
	trusted := certify(t, certFile, keyFile)
	p := example(t, "cryo_server_tls.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CERT_FILE="+certFile, "KEY_FILE="+keyFile,
		"CRYO_TOKEN="+token, "CRYO_NEXT_TOKEN=next", "SESSIONS_PER_ADDRESS=2", "FILE="+messages)
	address := p.wantLogged("Listening for Cryo clients on ")
	knock := func(opts cryo.DialOptions) (*cryo.Session, error) {
		if opts.TLS == nil {
			opts.TLS = trusted
		}
		return cryo.Dial(t.Context(), "wss://"+address, &opts)
	}
	s, err := knock(cryo.DialOptions{Token: token, SessionID: 7, Header: http.Header{"Origin": {"https://app.example.com"}}})
	require.NoError(t, err)
	require.NoError(t, next(t, send(s, "hello")))

	// What is asked for, and what is said to those who ask for something else.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: trusted, DisableKeepAlives: true}}
	get := func(path string, header http.Header) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+path, http.NoBody)
		require.NoError(t, err)
		req.Header = header
		resp, err := client.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, strings.TrimSpace(string(body))
	}
	status, body := get("/", http.Header{})
	require.Equal(t, http.StatusUpgradeRequired, status)
	require.Equal(t, "This is a Cryo server: connect with a Cryo client, over WebSocket.", body)
	status, _ = get("/else", http.Header{})
	require.Equal(t, http.StatusNotFound, status)
	status, _ = get("/", http.Header{"X-Long": {strings.Repeat("x", 30_000)}})
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, status)
	_, err = cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token})
	require.ErrorContains(t, err, "Client sent an HTTP request to an HTTPS server.")
	old := trusted.Clone()
	old.MaxVersion = tls.VersionTLS12
	_, err = knock(cryo.DialOptions{Token: token, TLS: old})
	require.ErrorContains(t, err, "protocol version")
	_, err = knock(cryo.DialOptions{Token: token, Header: http.Header{"Origin": {"https://evil.test"}}})
	require.ErrorContains(t, err, "403 Forbidden: This origin is not allowed.")

	// A session belongs to its token, and to who comes back with it.
	_, err = knock(cryo.DialOptions{Token: "next", SessionID: 7})
	require.ErrorIs(t, err, cryo.ErrSessionExists)
	_, err = knock(cryo.DialOptions{Token: "wrong", SessionID: 7})
	require.ErrorIs(t, err, cryo.ErrUnauthorized, "who has no token does not learn that the session exists")
	require.NoError(t, next(t, send(s, "still here")))
	again, err := knock(cryo.DialOptions{Token: token, SessionID: 7})
	require.NoError(t, err)
	<-s.Done()
	require.NoError(t, next(t, send(again, "again")))

	second, err := knock(cryo.DialOptions{Token: "next"})
	require.NoError(t, err)
	_, err = knock(cryo.DialOptions{Token: "next"})
	require.ErrorContains(t, err, "429 Too Many Requests: This address has reached its limit of sessions.")
	require.NoError(t, second.Close(t.Context(), ""))

	// The certificate is renewed.
	renewed := certify(t, certFile, keyFile)
	require.EventuallyWithT(t, func(c *assertT) {
		third, err := knock(cryo.DialOptions{Token: token, TLS: renewed})
		require.NoError(c, err)
		require.NoError(c, third.Close(context.Background(), ""))
	}, patience, 50*time.Millisecond)
	require.NoError(t, next(t, send(again, "since before")))
	require.NoError(t, again.Close(t.Context(), ""))
	p.interrupt()
	content, err := os.ReadFile(messages)
	require.NoError(t, err)
	require.Equal(t, "hello\nstill here\nagain\nsince before\n", string(content))
}

func TestRefusalsDoNotFloodTheLog(t *testing.T) {
	p := example(t, "cryo_server_to_file.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "FILE="+filepath.Join(t.TempDir(), "messages.txt"))
	address := p.wantLogged("Listening for Cryo clients on ")
	begin := time.Now()
	for range 300 {
		_, err := cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: "guessed"})
		require.ErrorIs(t, err, cryo.ErrUnauthorized)
	}
	lines := 0
	for _, line := range p.said() {
		if strings.Contains(line, "Denied a client") {
			lines++
		}
		require.NotContains(t, line, "guessed")
	}
	require.Positive(t, lines)
	require.LessOrEqual(t, lines, 2+int(time.Since(begin)/time.Second), "one a second")
	p.interrupt()
}
