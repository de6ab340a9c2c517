package plugin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its own certificate
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{file: filepath.Join(t.TempDir(), "ca.pem")}
	a.cert, a.key = a.issue(t, name, a.file, "")
	return a
}

// issue writes a certificate and its key, for clients and for servers at the
// addresses of the tests. The first one is the authority's own.
func (a *authority) issue(t testing.TB, name, certFile, keyFile string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), // synctest lives in 2000
		NotAfter:     time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		IPAddresses:  []net.IP{net.IPv4(192, 0, 2, 2), net.IPv4(127, 0, 0, 1)},
		IsCA:         a.cert == nil, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	writePEM(t, certFile, "CERTIFICATE", der)
	if keyFile != "" {
		der, err := x509.MarshalECPrivateKey(key)
		require.NoError(t, err)
		writePEM(t, keyFile, "EC PRIVATE KEY", der)
	}
	return cert, key
}

// writePEM replaces a file by one that is told from the old one: two that are
// written at once may have the same time.
func writePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	modified := time.Now()
	if old, err := os.Stat(path); err == nil {
		modified = old.ModTime().Add(time.Second)
	}
	require.NoError(t, os.WriteFile(path+".new", pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	require.NoError(t, os.Chtimes(path+".new", modified, modified))
	require.NoError(t, os.Rename(path+".new", path))
}

// trusting is a client's configuration.
func (a *authority) trusting(certificates ...tls.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{RootCAs: roots, Certificates: certificates, MinVersion: tls.VersionTLS12}
}

// client issues a client's certificate.
func (a *authority) client(t testing.TB, name string) tls.Certificate {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	a.issue(t, name, certFile, keyFile)
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	require.NoError(t, err)
	return cert
}

// certificate makes the files of a certificate which is its own authority.
func certificate(t testing.TB) (certFile, keyFile string) {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	(&authority{}).issue(t, "self", certFile, keyFile)
	return certFile, keyFile
}

// served tells the name in the certificate that a listener shows.
func (e *engine) served(t *testing.T, config *tls.Config) string {
	t.Helper()
	c, err := e.net.Dial(t.Context(), "tcp", somewhere)
	require.NoError(t, err)
	config = config.Clone()
	config.ServerName = "192.0.2.2"
	secured := tls.Client(c, config)
	defer secured.Close()
	require.NoError(t, secured.HandshakeContext(t.Context()))
	return secured.ConnectionState().PeerCertificates[0].Subject.CommonName
}

func TestInputAndOutputConnectOverTLS(t *testing.T) {
	certFile, keyFile := certificate(t)
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+" }"), toProbe)
		const url = "url: wss://" + somewhere + ", token: " + token
		e.run(fromOnce, "cryo: { "+url+", tls: { enabled: true, root_cas_file: "+certFile+" } }")
		f := e.produce("over TLS")
		a := e.arrival()
		require.Equal(t, []string{"over TLS"}, a.texts())
		a.deliver()
		f.wantDelivered(t, "acknowledged")

		e.run(fromOnce, "cryo: { "+url+" }")
		e.log.want(t, "certificate signed by unknown authority")
	})
}

func TestOldTLSVersionsAreRejected(t *testing.T) {
	ca := newAuthority(t, "ca")
	certFile, keyFile := filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	ca.issue(t, "server", certFile, keyFile)
	for _, tt := range []struct {
		settings string
		highest  uint16
		refused  bool
	}{
		{"", tls.VersionTLS11, true},
		{"", tls.VersionTLS12, false},
		{", min_version: tls12", tls.VersionTLS12, false},
		{", min_version: tls13", tls.VersionTLS12, true},
		{", min_version: tls13", tls.VersionTLS13, false},
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+tt.settings+" }"), toProbe)
			config := ca.trusting()
			config.MinVersion, config.MaxVersion = tls.VersionTLS10, tt.highest
			s, err := cryo.Dial(t.Context(), "wss://"+somewhere, &cryo.DialOptions{Token: token, NetDial: e.net.Dial, TLS: config})
			if tt.refused {
				require.ErrorContains(t, err, "protocol version")
				return
			}
			require.NoError(t, err)
			require.NoError(t, s.Close(t.Context(), ""))
		})
	}
}

func TestRenewedCertificateIsServedWithoutARestart(t *testing.T) {
	ca := newAuthority(t, "ca")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "first", certFile, keyFile)
	inEngine(t, func(t *testing.T, e *engine) {
		const failure = "ERROR Cannot reload TLS files"
		e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+" }"), toProbe)
		stays, err := cryo.Dial(t.Context(), "wss://"+somewhere, &cryo.DialOptions{Token: token, NetDial: e.net.Dial, TLS: ca.trusting()})
		require.NoError(t, err)
		require.Equal(t, "first", e.served(t, ca.trusting()))

		ca.issue(t, "second", certFile, keyFile)
		require.Equal(t, "first", e.served(t, ca.trusting()), "files are not looked at for each client")
		time.Sleep(filesInterval)
		require.Equal(t, "second", e.served(t, ca.trusting()))
		require.Equal(t, 1, e.log.count("INFO Reloaded TLS files", "cert_file="+certFile))

		// A certificate arrives before its key.
		newKey := keyFile + ".late"
		ca.issue(t, "third", certFile, newKey)
		for range 3 {
			time.Sleep(filesInterval)
			require.Equal(t, "second", e.served(t, ca.trusting()))
		}
		require.Equal(t, 1, e.log.count(failure, "error=tls: private key does not match public key"), "logged once")
		require.NoError(t, os.Rename(newKey, keyFile))
		time.Sleep(filesInterval)
		require.Equal(t, "third", e.served(t, ca.trusting()))

		require.NoError(t, os.Remove(certFile))
		time.Sleep(filesInterval)
		require.Equal(t, "third", e.served(t, ca.trusting()))
		require.Equal(t, 1, e.log.count(failure, "error=open "+certFile))
		require.NoError(t, os.WriteFile(certFile, []byte("no certificate"), 0o600))
		time.Sleep(filesInterval)
		require.Equal(t, "third", e.served(t, ca.trusting()))
		require.Equal(t, 1, e.log.count(failure, "error=tls: failed to find any PEM data"))
		ca.issue(t, "fourth", certFile, keyFile)
		time.Sleep(filesInterval)
		require.Equal(t, "fourth", e.served(t, ca.trusting()))

		e.wantReceives(t, stays, "delivered")
	})
}

func TestClientCertificateMustComeFromTheConfiguredAuthority(t *testing.T) {
	ca, devices, others := newAuthority(t, "ca"), newAuthority(t, "devices"), newAuthority(t, "others")
	dir := t.TempDir()
	certFile, keyFile, clientCA := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "clients.pem")
	ca.issue(t, "server", certFile, keyFile)
	writePEM(t, clientCA, "CERTIFICATE", devices.cert.Raw)
	known, unknown := devices.client(t, "device-1"), others.client(t, "stranger")
	for settings, anonymousToo := range map[string]bool{"": false, ", client_auth: verify_if_given": true} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+", client_ca_file: "+clientCA+settings+" }"), toProbe)
			dial := func(token string, certificates ...tls.Certificate) error {
				config := ca.trusting()
				config.ClientSessionCache = tls.NewLRUClientSessionCache(0)
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					if len(certificates) == 0 {
						return &tls.Certificate{}, nil
					}
					return &certificates[0], nil // whatever the server asks for
				}
				s, err := cryo.Dial(t.Context(), "wss://"+somewhere, &cryo.DialOptions{Token: token, NetDial: e.net.Dial, TLS: config})
				if err == nil {
					err = s.Close(context.Background(), "")
				}
				return err
			}
			require.NoError(t, dial(token, known))
			require.ErrorIs(t, dial("wrong", known), cryo.ErrUnauthorized, "a certificate is no token")
			require.Error(t, dial(token, unknown)) // whatever arrives of the alert
			synctest.Wait()
			e.log.want(t, "tls: failed to verify certificate: x509: certificate signed by unknown authority")
			time.Sleep(time.Second) // until the next log line
			if err := dial(token); anonymousToo {
				require.NoError(t, err)
			} else {
				require.Error(t, err)
				synctest.Wait()
				e.log.want(t, "tls: client didn't provide a certificate")
			}

			// The authority is replaced.
			writePEM(t, clientCA, "CERTIFICATE", others.cert.Raw)
			time.Sleep(filesInterval)
			require.Error(t, dial(token, known))
			require.NoError(t, dial(token, unknown))
			writePEM(t, clientCA, "CERTIFICATE", devices.cert.Raw)
		})
	}
}

func TestWrongURLSchemeIsReported(t *testing.T) {
	certFile, keyFile := certificate(t)
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		_, err := cryo.Dial(t.Context(), "wss://"+somewhere, &cryo.DialOptions{Token: token, NetDial: e.net.Dial})
		require.ErrorContains(t, err, "the server does not use TLS: check whether its URL is ws:// instead of wss://")
	})
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+" }"), toProbe)
		for range 5 {
			_, err := e.tryDial(cryo.DialOptions{Token: token})
			require.ErrorContains(t, err, "400 Bad Request: Client sent an HTTP request to an HTTPS server.")
		}
		const words = "error=http: TLS handshake error from 192.0.2.1:50000: client sent an HTTP request to an HTTPS server"
		synctest.Wait()
		require.Equal(t, 1, e.log.count(words))
		time.Sleep(time.Second)
		_, err := e.tryDial(cryo.DialOptions{Token: token})
		require.Error(t, err)
		synctest.Wait()
		require.Equal(t, 2, e.log.count(words))
		require.Equal(t, 2, e.log.count("DEBUG Malformed HTTP request or TLS handshake"))
		require.Equal(t, 1, e.log.count("suppressed=4"))
	})
}

func TestClientThatStallsTheTLSHandshakeIsDisconnected(t *testing.T) {
	certFile, keyFile := certificate(t)
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "handshake_timeout: 2s, tls: { cert_file: "+certFile+", key_file: "+keyFile+" }"), toProbe)
		c, err := e.net.Dial(t.Context(), "tcp", somewhere)
		require.NoError(t, err)
		begin := time.Now()
		_, err = c.Read(make([]byte, 1))
		require.Error(t, err)
		require.Equal(t, 2*time.Second, time.Since(begin))
		assert.NoError(t, c.Close())
	})
}

func TestAuthorizeSeesTheClientCertificate(t *testing.T) {
	ca, devices := newAuthority(t, "ca"), newAuthority(t, "devices")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "server", certFile, keyFile)
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with("cryo_server: { address: '"+somewhere+`', authorize: 'root.device = this.client_certificate.common_name.or("none")' }`,
			"tls: { cert_file: "+certFile+", key_file: "+keyFile+", client_ca_file: "+devices.file+", client_auth: verify_if_given }"), toProbe)
		for want, config := range map[string]*tls.Config{"device-1": ca.trusting(devices.client(t, "device-1")), "none": ca.trusting()} {
			s, err := cryo.Dial(t.Context(), "wss://"+somewhere, &cryo.DialOptions{NetDial: e.net.Dial, TLS: config})
			require.NoError(t, err)
			_ = send(s, "hello")
			a := e.arrival()
			device, _ := a.batch[0].MetaGet("cryo_auth_device")
			require.Equal(t, want, device)
			a.deliver()
			require.NoError(t, s.Close(t.Context(), ""))
		}
	})
}

func TestOnlyTheCertificateOwnerCanTakeOverASession(t *testing.T) {
	ca, devices := newAuthority(t, "servers"), newAuthority(t, "devices")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "server", certFile, keyFile)
	owner, other := devices.client(t, "device-1"), devices.client(t, "device-2")
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+", client_ca_file: "+devices.file+" }"), toProbe)
		dial := func(certificate tls.Certificate) (*cryo.Session, error) {
			return cryo.Dial(t.Context(), "wss://"+somewhere, &cryo.DialOptions{
				Token: token, SessionID: 5, NetDial: e.net.Dial, TLS: ca.trusting(certificate),
			})
		}
		ghost, err := dial(owner)
		require.NoError(t, err)
		_, err = dial(other)
		require.ErrorIs(t, err, cryo.ErrSessionExists)
		require.NoError(t, ghost.Err())
		s, err := dial(owner)
		require.NoError(t, err)
		synctest.Wait()
		require.Error(t, ghost.Err())
		require.NoError(t, s.Close(context.Background(), ""))
	})
}

// The engine calls Connect again. Until it returns, the pipeline cannot stop.
func TestListenerThatCannotReadItsCertificateDelaysNoStop(t *testing.T) {
	certFile, keyFile := certificate(t)
	inEngine(t, func(t *testing.T, e *engine) {
		defer withoutDescriptors(t)()
		p := e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+" }"), toProbe)
		begin := time.Now()
		p.stop()
		require.Zero(t, time.Since(begin))
		require.NotZero(t, e.log.count("ERROR Failed to connect", "too many open files: raise the limit"))
	})
}
