package plugin

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestClientAddressIsTheLastUntrustedHop(t *testing.T) {
	const direct = "192.0.2.1:50000" // of clients in memory
	trusted := "trusted_proxies: [ 192.0.2.0/24, '10.0.0.9', '2001:db8:ff::/48' ]"
	forwarded := trusted + ", forwarded_header: forwarded"
	for _, tt := range []struct {
		name, settings string
		header         http.Header
		want           string
	}{
		{"nobody is trusted", "", http.Header{"X-Forwarded-For": {"203.0.113.7"}}, direct},
		{"another is trusted", "trusted_proxies: [ 10.0.0.0/8 ]", http.Header{"X-Forwarded-For": {"203.0.113.7"}}, direct},
		{"no header", trusted, nil, direct},
		{"one hop", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7"}}, "203.0.113.7"},
		{"an entry from the client", trusted, http.Header{"X-Forwarded-For": {"10.0.0.9, 198.51.100.1, 203.0.113.7"}}, "203.0.113.7"},
		{"an entry from the client, in its own line", trusted, http.Header{"X-Forwarded-For": {"198.51.100.1", "203.0.113.7"}}, "203.0.113.7"},
		{"two hops", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7, 10.0.0.9"}}, "203.0.113.7"},
		{"two hops, in lines", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7", "10.0.0.9"}}, "203.0.113.7"},
		{"an unknown hop", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7, 10.0.0.8"}}, "10.0.0.8"},
		{"trusted ones only", trusted, http.Header{"X-Forwarded-For": {"10.0.0.9, 192.0.2.77"}}, "10.0.0.9"},
		{"with a port", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7:4711"}}, "203.0.113.7:4711"},
		{"IPv6", trusted, http.Header{"X-Forwarded-For": {"2001:db8::1, 2001:db8:ff::2"}}, "2001:db8::1"},
		{"IPv6 in brackets", trusted, http.Header{"X-Forwarded-For": {"[2001:db8::1], [2001:db8:ff::2]"}}, "2001:db8::1"},
		{"IPv6 with a port", trusted, http.Header{"X-Forwarded-For": {"[2001:db8::1]:4711"}}, "[2001:db8::1]:4711"},
		{"IPv4 in IPv6", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7, ::ffff:10.0.0.9"}}, "203.0.113.7"},
		{"a trusted address written as IPv4 in IPv6", "trusted_proxies: [ '::ffff:192.0.2.1' ]", http.Header{"X-Forwarded-For": {"203.0.113.7"}}, "203.0.113.7"},
		{"a trusted network written as IPv4 in IPv6", "trusted_proxies: [ '::ffff:192.0.2.0/120' ]", http.Header{"X-Forwarded-For": {"203.0.113.7"}}, "203.0.113.7"},
		{"an address with a zone", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7, 2001:db8:ff::2%eth0"}}, "203.0.113.7"},
		{"unknown", trusted, http.Header{"X-Forwarded-For": {"unknown"}}, direct},
		{"nonsense behind a trusted one", trusted, http.Header{"X-Forwarded-For": {"203.0.113.7, x, 10.0.0.9"}}, "10.0.0.9"},
		{"nothing", trusted, http.Header{"X-Forwarded-For": {""}}, direct},
		{"the other header", trusted, http.Header{"Forwarded": {"for=203.0.113.7"}}, direct},
		{"Forwarded", forwarded, http.Header{"Forwarded": {"for=203.0.113.7;proto=https;by=192.0.2.1"}}, "203.0.113.7"},
		{"Forwarded, and the other header", forwarded, http.Header{"Forwarded": {"for=203.0.113.7"}, "X-Forwarded-For": {"198.51.100.1"}}, "203.0.113.7"},
		{"Forwarded, two hops", forwarded, http.Header{"Forwarded": {`for=198.51.100.1, proto=https;For="[2001:db8::1]:4711" , for=10.0.0.9`}}, "[2001:db8::1]:4711"},
		{"Forwarded, IPv6", forwarded, http.Header{"Forwarded": {`for="[2001:db8::1]"`}}, "2001:db8::1"},
		{"Forwarded, hidden", forwarded, http.Header{"Forwarded": {`for=_mystery`}}, direct},
		{"Forwarded, without an address", forwarded, http.Header{"Forwarded": {`for=203.0.113.7, proto=https`}}, direct},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(`cryo_server: { address: '`+somewhere+`', authorize: 'root.seen = this.remote_address' }`, tt.settings), toProbe)
				client, err := e.tryDial(cryo.DialOptions{Header: tt.header})
				require.NoError(t, err)
				e.wantRemoteAddress(t, client, tt.want)
			})
		})
	}
}

// wantRemoteAddress wants an address in the metadata of the client's messages, in the input of
// authorize and in the log.
func (e *engine) wantRemoteAddress(t *testing.T, client *cryo.Session, want string) {
	t.Helper()
	send(client, "hello")
	m := e.arrival().batch[0]
	address, _ := m.MetaGet("cryo_remote_address")
	require.Equal(t, want, address)
	seen, _ := m.MetaGet("cryo_auth_seen")
	require.Equal(t, want, seen)
	e.log.want(t, "Session connected", "remote="+want)
}

func TestAddressLimitAppliesToTheClientBehindAProxy(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_sessions_per_address: 1, trusted_proxies: [ 192.0.2.1 ]"), toProbe)
		from := func(address string) error {
			_, err := e.tryDial(cryo.DialOptions{Token: token, Header: http.Header{"X-Forwarded-For": {address}}})
			return err
		}
		require.NoError(t, from("203.0.113.7"))
		var refused *cryo.HandshakeError
		require.ErrorAs(t, from("203.0.113.7"), &refused)
		require.Equal(t, http.StatusTooManyRequests, refused.StatusCode)
		e.log.want(t, "remote=203.0.113.7")
		require.NoError(t, from("203.0.113.8"))
		require.Error(t, from("198.51.100.1, 203.0.113.8"), "what a client claims makes no other one of it")

		require.NoError(t, from("[2001:db8::1]"))
		require.Error(t, from("2001:db8::2"), "of the same network")
		require.NoError(t, from("[2001:db8:0:1::1]"), "of another one")
	})
}

// onSocket runs an input on a real socket and gives its address.
func onSocket(t *testing.T, e *engine, settings string) string {
	t.Helper()
	e.shared.listen = net.Listen
	p := e.start(with("cryo_server: { address: '127.0.0.1:0', tokens: [ "+token+" ] }", settings), toProbe)
	t.Cleanup(p.kill)
	var address string
	require.Eventually(t, func() bool {
		_, line, found := strings.Cut(strings.Join(e.log.all(), "\n"), " address=")
		address, _, _ = strings.Cut(strings.ReplaceAll(line, "\n", " "), " ")
		return found
	}, time.Minute, time.Millisecond)
	return address
}

func TestClientsConnectThroughAReverseProxyWithAPrefix(t *testing.T) {
	for _, tt := range []struct {
		name, settings string
		strip          bool
	}{
		{"taken off", "trusted_proxies: [ 127.0.0.1 ]", true},
		{"left on", "trusted_proxies: [ 127.0.0.1 ], path: /feeds/cryo", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Cleanup(func() { checkLeaks(t) })
			e := newEngine(t)
			address := onSocket(t, e, tt.settings)
			target, err := url.Parse("http://" + address)
			require.NoError(t, err)
			var handler http.Handler = &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(target)
				r.Out.Host = r.In.Host
				r.Out.Header["X-Forwarded-For"] = []string{"203.0.113.7"} // where this proxy's client is
				r.SetXForwarded()
				r.Out.Header.Set("X-Forwarded-For", "203.0.113.7, "+r.Out.Header.Get("X-Forwarded-For"))
			}}
			if tt.strip {
				handler = http.StripPrefix("/feeds/cryo", handler)
			}
			proxy := httptest.NewTLSServer(handler)
			defer proxy.Close()
			trusted := proxy.Client().Transport.(*http.Transport).TLSClientConfig
			s, err := cryo.Dial(t.Context(), strings.Replace(proxy.URL, "https:", "wss:", 1)+"/feeds/cryo", &cryo.DialOptions{Token: token, TLS: trusted})
			require.NoError(t, err)
			m := send(s, "hello")
			a := e.arrival()
			remote, _ := a.batch[0].MetaGet("cryo_remote_address")
			require.Equal(t, "203.0.113.7", remote)
			a.deliver()
			m.wantAcked(t, "delivered")
			require.NoError(t, s.Close(t.Context(), ""))
		})
	}
}

func TestRenewedCertificateIsServedOverRealSocketsWithClientCertificates(t *testing.T) {
	ca, devices := newAuthority(t, "ca"), newAuthority(t, "devices")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "first", certFile, keyFile)
	e := newEngine(t)
	address := onSocket(t, e, "tls: { cert_file: "+certFile+", key_file: "+keyFile+", client_ca_file: "+devices.file+" }")
	device := devices.client(t, "device-1")
	dial := func(by *authority) (*cryo.Session, error) {
		return cryo.Dial(t.Context(), "wss://"+address, &cryo.DialOptions{Token: token, TLS: by.trusting(device)})
	}
	s, err := dial(ca)
	require.NoError(t, err)
	_, err = cryo.Dial(t.Context(), "wss://"+address, &cryo.DialOptions{Token: token, TLS: ca.trusting()})
	require.Error(t, err, "without a certificate")

	renewed := newAuthority(t, "another ca")
	renewed.issue(t, "second", certFile, keyFile)
	require.Eventually(t, func() bool {
		again, err := dial(renewed)
		return err == nil && again.Close(t.Context(), "") == nil
	}, time.Minute, 50*time.Millisecond)
	e.wantReceives(t, s, "over the first certificate's connection")
	require.NoError(t, s.Close(t.Context(), ""))
}
