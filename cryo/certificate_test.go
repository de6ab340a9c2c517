package cryo_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// withCertificate is the error of dialling a server with a certificate, which is its own authority.
func withCertificate(t *testing.T, token, host string, change func(*x509.Certificate)) error {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true,
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	if cert, err := x509.ParseCertificate(der); err == nil && template.Subject.CommonName == "" {
		roots.AddCert(cert)
	}
	l := cryotest.Listen()
	serving := make(chan struct{})
	go func() {
		defer close(serving)
		if c, err := l.Accept(); err == nil {
			server := tls.Server(c, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
			_ = server.HandshakeContext(t.Context())
			_ = server.Close()
		}
	}()
	_, err = cryo.Dial(t.Context(), "wss://"+host, &cryo.DialOptions{
		NetDial: l.Dial, Token: token, Header: http.Header{"X-Key": {"another-s3cret"}}, TLS: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
	})
	_ = l.Close()
	<-serving
	return err
}

func TestCertificateErrorsDoNotContainTheToken(t *testing.T) {
	const secret = "s3cret-0123456789"
	base32 := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString([]byte(secret))
	for name, tt := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"in a URI": {
			func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "x", Host: "." + secret + "."}} },
			"tls: failed to parse certificate from server: (the reason is redacted, because it may contain a secret)",
		},
		"in a name": {
			func(c *x509.Certificate) { c.DNSNames = []string{secret + ".test"} },
			"x509: certificate is not valid for cryo.test, and its own names are redacted, because they may contain a secret",
		},
		"encoded in a name": {
			func(c *x509.Certificate) { c.DNSNames = []string{base32 + ".test"} },
			"x509: certificate is not valid for cryo.test, and its own names are redacted, because they may contain a secret",
		},
		"in the name of an authority": {
			func(c *x509.Certificate) {
				c.Subject = pkix.Name{CommonName: secret}
				c.DNSNames = []string{"cryo.test"}
			},
			"x509: certificate signed by unknown authority",
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := withCertificate(t, secret, "cryo.test", tt.change)
			require.ErrorContains(t, err, "dialling wss://cryo.test: tls: failed to ")
			require.ErrorContains(t, err, tt.want)
			wantNoSecret(t, err, secret)
			require.NotContains(t, err.Error(), base32)
		})
	}
	var addresses []net.IP
	for i := 0; i+4 <= len(secret); i += 4 {
		addresses = append(addresses, net.IP(secret[i:i+4]))
	}
	err := withCertificate(t, secret, "192.0.2.1", func(c *x509.Certificate) { c.IPAddresses = addresses })
	require.EqualError(t, err, "dialling wss://192.0.2.1: tls: failed to verify certificate: x509: certificate is not valid for 192.0.2.1, and its own names are redacted, because they may contain a secret")
}

func TestInvalidCertificateIsExplained(t *testing.T) {
	ended := time.Now().Add(-48 * time.Hour)
	begins := time.Now().Add(48 * time.Hour)
	for want, change := range map[string]func(*x509.Certificate){
		"x509: certificate is valid for cryo.example.com, www.example.com, not cryo.test": func(c *x509.Certificate) {
			c.DNSNames = []string{"cryo.example.com", "www.example.com"}
		},
		"x509: certificate is not valid for any names, but wanted to match cryo.test": func(*x509.Certificate) {},
		"x509: certificate has expired on " + ended.UTC().Format(time.DateOnly): func(c *x509.Certificate) {
			c.DNSNames, c.NotBefore, c.NotAfter = []string{"cryo.test"}, ended.Add(-time.Hour), ended
		},
		"x509: certificate is not valid before " + begins.UTC().Format(time.DateOnly) + ": check the clock of this system": func(c *x509.Certificate) {
			c.DNSNames, c.NotBefore, c.NotAfter = []string{"cryo.test"}, begins, begins.Add(time.Hour)
		},
	} {
		err := withCertificate(t, token, "cryo.test", change)
		require.EqualError(t, err, "dialling wss://cryo.test: tls: failed to verify certificate: "+want)
		require.ErrorAs(t, err, new(*tls.CertificateVerificationError))
	}
}
