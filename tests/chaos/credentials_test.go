//go:build linux

package chaos

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// credentials are the token and the certificates of all servers, in files that the
// processes load again. A client that still has the last token, or the last authority, is
// let in until the next renewal, as where operators renew them.
type credentials struct {
	tokens, token               string // files: accepted ones, and that of clients
	authorities, cert, key      string // files
	mu                          sync.Mutex
	allTokens, allAuthorities   []string // all that were issued, oldest first
	pool                        *x509.CertPool
	renewedTokens, renewedCerts int
}

// newCredentials makes the first ones.
func newCredentials(tb testing.TB, dir string) *credentials {
	tb.Helper()
	c := &credentials{
		tokens: filepath.Join(dir, "tokens"), token: filepath.Join(dir, "token"),
		authorities: filepath.Join(dir, "authorities.pem"), cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem"),
	}
	require.NoError(tb, c.renewToken(func() {}))
	require.NoError(tb, c.renewCertificate(func() {}))
	c.renewedTokens, c.renewedCerts = 0, 0
	return c
}

// clientToken returns the token of clients.
func (c *credentials) clientToken() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.allTokens[len(c.allTokens)-1]
}

// clientTLS returns the TLS configuration of clients.
func (c *credentials) clientTLS() *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &tls.Config{RootCAs: c.pool, MinVersion: tls.VersionTLS12}
}

// secrets returns all tokens, which no log may contain.
func (c *credentials) secrets() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.allTokens)
}

// renewToken lets servers accept another token, calls between, and gives it to clients.
func (c *credentials) renewToken(between func()) error {
	token := "token-" + rand.Text()
	c.mu.Lock()
	accepted := append(lastOf(c.allTokens), token)
	c.mu.Unlock()
	if err := replace(c.tokens, strings.Join(accepted, "\n")+"\n"); err != nil {
		return err
	}
	between()
	if err := replace(c.token, token+"\n"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.allTokens = append(c.allTokens, token)
	c.renewedTokens++
	return nil
}

// renewCertificate lets clients trust another authority, calls between, and gives servers
// a certificate and its key, which are two files.
func (c *credentials) renewCertificate(between func()) error {
	cert, key, err := selfSigned()
	if err != nil {
		return err
	}
	c.mu.Lock()
	trusted := strings.Join(append(lastOf(c.allAuthorities), cert), "")
	c.allAuthorities = append(c.allAuthorities, cert)
	c.pool = x509.NewCertPool()
	c.pool.AppendCertsFromPEM([]byte(trusted))
	c.renewedCerts++
	c.mu.Unlock()
	if err := replace(c.authorities, trusted); err != nil {
		return err
	}
	between()
	// A process that starts between these two has a certificate without its key, and ends.
	return errors.Join(replace(c.cert, cert), replace(c.key, key))
}

// lastOf returns a new slice with the last element, if there is one.
func lastOf(all []string) []string { return slices.Clone(all[max(0, len(all)-1):]) }

// replace replaces a file by renaming another one.
func replace(path, content string) error {
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// selfSigned returns a certificate for loopback, and its key.
func selfSigned() (cert, key string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		return "", "", err
	}
	keyDER, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		return "", "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})), nil
}
