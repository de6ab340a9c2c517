package tests

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// certify writes a self-signed certificate and its key, and returns the TLS
// configuration of a client that trusts it.
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

func TestTLSServerDeniesUnsafeClients(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile, messages := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "messages.txt")
	trusted := certify(t, certFile, keyFile)
	p := example(t, "cryo_server_tls.yaml", "CRYO_ADDRESS=127.0.0.1:0", "CERT_FILE="+certFile, "KEY_FILE="+keyFile,
		"CRYO_TOKEN="+token, "CRYO_NEXT_TOKEN=next", "SESSIONS_PER_ADDRESS=2", "FILE="+messages)
	address := p.Listening()
	dial := func(opts cryo.DialOptions) (*cryo.Session, error) {
		if opts.TLS == nil {
			opts.TLS = trusted
		}
		return cryo.Dial(t.Context(), "wss://"+address, &opts)
	}
	s, err := dial(cryo.DialOptions{Token: token, SessionID: 7, Header: http.Header{"Origin": {"https://app.example.com"}}})
	require.NoError(t, err)
	testkit.WantDelivered(t, s, "hello")

	transport := &http.Transport{TLSClientConfig: trusted}
	status := func(path string, header http.Header) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+path, http.NoBody)
		require.NoError(t, err)
		req.Header = header
		resp, err := testkit.Do(transport, req)
		require.NoError(t, err)
		return resp.Status
	}
	require.Equal(t, http.StatusUpgradeRequired, status("/", http.Header{}))
	require.Equal(t, http.StatusNotFound, status("/else", http.Header{}))
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, status("/", http.Header{"X-Long": {strings.Repeat("x", 30_000)}}))

	var handshake *cryo.HandshakeError
	_, err = cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token})
	require.ErrorAs(t, err, &handshake)
	require.Equal(t, http.StatusBadRequest, handshake.StatusCode, "HTTP on the HTTPS port")
	old := trusted.Clone()
	old.MaxVersion = tls.VersionTLS12
	_, err = dial(cryo.DialOptions{Token: token, TLS: old})
	require.ErrorContains(t, err, "protocol version") // the alert's type is not exported
	_, err = dial(cryo.DialOptions{Token: token, Header: http.Header{"Origin": {"https://evil.test"}}})
	require.ErrorAs(t, err, &handshake)
	require.Equal(t, http.StatusForbidden, handshake.StatusCode)

	// A session belongs to its token: only a client with the same one takes it over.
	_, err = dial(cryo.DialOptions{Token: "next", SessionID: 7})
	require.ErrorIs(t, err, cryo.ErrSessionExists)
	_, err = dial(cryo.DialOptions{Token: "wrong", SessionID: 7})
	require.ErrorIs(t, err, cryo.ErrUnauthorized, "a client without a valid token does not learn that the session exists")
	testkit.WantDelivered(t, s, "still here")
	again, err := dial(cryo.DialOptions{Token: token, SessionID: 7})
	require.NoError(t, err)
	<-s.Done()
	testkit.WantDelivered(t, again, "again")

	second, err := dial(cryo.DialOptions{Token: "next"})
	require.NoError(t, err)
	_, err = dial(cryo.DialOptions{Token: "next"})
	require.ErrorAs(t, err, &handshake)
	require.Equal(t, http.StatusTooManyRequests, handshake.StatusCode)
	require.NoError(t, second.Close(t.Context(), ""))

	// The certificate is replaced while the server runs.
	renewed := certify(t, certFile, keyFile)
	testkit.Eventually(t, func(c *assert.CollectT) {
		third, err := dial(cryo.DialOptions{Token: token, TLS: renewed})
		require.NoError(c, err)
		require.NoError(c, third.Close(context.Background(), ""))
	})
	testkit.WantDelivered(t, again, "since before")
	require.NoError(t, again.Close(t.Context(), ""))
	p.Interrupt()
	require.Equal(t, "hello\nstill here\nagain\nsince before\n", testkit.ReadFile(t, messages))
}

func TestDeniedClientsDoNotFloodTheLog(t *testing.T) {
	p := example(t, "cryo_server_to_file.yaml", "FILE="+filepath.Join(t.TempDir(), "messages.txt"))
	address := p.Listening()
	begin := time.Now()
	for range 300 {
		_, err := cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: "guessed"})
		require.ErrorIs(t, err, cryo.ErrUnauthorized)
	}
	lines := 0
	for _, line := range p.All() {
		if strings.Contains(line, "Denied a client") {
			lines++
		}
		require.NotContains(t, line, "guessed")
	}
	require.Positive(t, lines)
	require.LessOrEqual(t, lines, 2+int(time.Since(begin)/time.Second), "one a second")
	p.Interrupt()
}
