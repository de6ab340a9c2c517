package plugin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

const (
	inMemory       = "192.0.2.1:50000" // address of clients in memory
	signatureOfV2  = "\r\n\r\n\x00\r\nQUIT\n"
	behindProxies  = "trusted_proxies: [ 192.0.2.1, 10.0.0.0/8 ], proxy_protocol: true"
	noProxyHeader  = "WARN Closing a connection from a trusted proxy: it sent no valid PROXY protocol header"
	v1Header       = "PROXY TCP4 203.0.113.7 192.0.2.2 4711 80\r\n"
	localV2        = 0x20
	proxyV2        = 0x21
	tcpOverIPv4    = 0x11
	tcpOverIPv6    = 0x21
	udpOverIPv4    = 0x12
	streamOverUnix = 0x31
)

// v2Header is a header of version 2, written by hand.
func v2Header(command, family byte, block ...byte) string {
	b := append([]byte(signatureOfV2), command, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(block)))
	return string(append(b, block...))
}

var (
	ipv4Block = []byte{203, 0, 113, 7, 192, 0, 2, 2, 0x12, 0x67, 0, 80}
	ipv6Block = slices.Concat(
		net.ParseIP("2001:db8::1"), net.ParseIP("2001:db8::2"), []byte{0x12, 0x67, 0, 80},
	)
	mappedBlock = slices.Concat( // IPv4 in IPv6
		net.ParseIP("203.0.113.7").To16(), net.ParseIP("192.0.2.2").To16(), []byte{0x12, 0x67, 0, 80},
	)
)

// through returns a dialer whose connections begin with a header, as those of a proxy.
func (e *engine) through(header string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := e.net.Dial(ctx, network, address)
		if err == nil {
			_, err = io.WriteString(c, header)
		}
		return c, err
	}
}

// tryDialThrough is tryDial through a proxy that sends a header.
func (e *engine) tryDialThrough(header string, requestHeaders http.Header) (*cryo.Session, error) {
	s, err := cryo.Dial(context.Background(), "ws://"+somewhere+"/", &cryo.DialOptions{Token: token, Header: requestHeaders, NetDial: e.through(header)})
	if err == nil {
		e.t.Cleanup(func() { end(s) })
	}
	return s, err
}

func TestClientAddressComesFromThePROXYHeader(t *testing.T) {
	forwarded := http.Header{"X-Forwarded-For": {"198.51.100.1"}}
	for _, tt := range []struct {
		name, header string
		request      http.Header
		want         string
	}{
		{"version 1", v1Header, nil, "203.0.113.7:4711"},
		{"version 1, IPv6", "PROXY TCP6 2001:db8::1 2001:db8::2 4711 80\r\n", nil, "[2001:db8::1]:4711"},
		{"version 1, a health check", "PROXY UNKNOWN\r\n", nil, inMemory},
		{"version 1, unknown, with addresses to be ignored", "PROXY UNKNOWN 203.0.113.7 192.0.2.2 4711 80\r\n", nil, inMemory},
		{"version 2", v2Header(proxyV2, tcpOverIPv4, ipv4Block...), nil, "203.0.113.7:4711"},
		{"version 2, IPv6", v2Header(proxyV2, tcpOverIPv6, ipv6Block...), nil, "[2001:db8::1]:4711"},
		{"version 2, IPv4 in IPv6", v2Header(proxyV2, tcpOverIPv6, mappedBlock...), nil, "203.0.113.7:4711"},
		{"version 2, with a kilobyte of TLVs", v2Header(proxyV2, tcpOverIPv4, append(slices.Clone(ipv4Block), append([]byte{4, 3, 253}, make([]byte, 1021)...)...)...), nil, "203.0.113.7:4711"},
		{"version 2, a health check", v2Header(localV2, 0), nil, inMemory},
		{"version 2, a health check with addresses", v2Header(localV2, tcpOverIPv4, ipv4Block...), nil, inMemory},
		{"a client that sends an HTTP header", v1Header, forwarded, "203.0.113.7:4711"},
		{"a reverse proxy behind the TCP proxy", "PROXY TCP4 10.0.0.9 192.0.2.2 4711 80\r\n", forwarded, "198.51.100.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(`cryo_server: { address: '`+somewhere+`', authorize: 'root.seen = this.remote_address' }`, behindProxies), toProbe)
				client, err := e.tryDialThrough(tt.header, tt.request)
				require.NoError(t, err)
				e.wantRemoteAddress(t, client, tt.want)
				require.Zero(t, e.log.count("WARN"))
			})
		})
	}
}

func TestProxyConnectionWithoutAValidHeaderIsClosed(t *testing.T) {
	tlvs := func(n int) []byte { return append(slices.Clone(ipv4Block), make([]byte, n)...) }
	for name, header := range map[string]string{
		"none":                                "",
		"half of version 1":                   "PROXY TCP4 203.0",
		"version 1 without an end":            "PROXY TCP4 " + strings.Repeat("1", 300),
		"version 1 with a line feed alone":    "PROXY TCP4 203.0.113.7 192.0.2.2 4711 80\n",
		"version 1 with a name":               "PROXY TCP4 localhost 192.0.2.2 4711 80\r\n",
		"version 1 with an address too short": "PROXY TCP4 203.0.113 192.0.2.2 4711 80\r\n",
		"version 1 with a port too large":     "PROXY TCP4 203.0.113.7 192.0.2.2 70000 80\r\n",
		"version 1 of another family":         "PROXY TCP6 203.0.113.7 192.0.2.2 4711 80\r\n",
		"version 1 in lower case":             "proxy tcp4 203.0.113.7 192.0.2.2 4711 80\r\n",
		"version 2 of another version":        v2Header(0x31, tcpOverIPv4, ipv4Block...),
		"version 2 of an unknown command":     v2Header(0x22, tcpOverIPv4, ipv4Block...),
		"version 2 of an unknown family":      v2Header(proxyV2, 0x41, ipv4Block...),
		"version 2 with a short block":        v2Header(proxyV2, tcpOverIPv4, ipv4Block[:8]...),
		"version 2 of a UNIX socket":          v2Header(proxyV2, streamOverUnix, bytes.Repeat([]byte{'\n'}, 216)...),
		"version 2 of UDP":                    v2Header(proxyV2, udpOverIPv4, ipv4Block...),
		"version 2 with 64 KiB of TLVs":       v2Header(proxyV2, tcpOverIPv4, tlvs(65_000)...),
		"half of the signature":               signatureOfV2[:7],
		"noise":                               "\x00\x01\x02\x03 what?\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, behindProxies+", handshake_timeout: 2s"), toProbe)
				begin := time.Now()
				_, err := e.tryDialThrough(header, nil)
				require.Error(t, err)
				require.LessOrEqual(t, time.Since(begin), 2*time.Second)
				e.log.want(t, noProxyHeader, "remote="+inMemory)
				require.Zero(t, e.metrics.value("cryo_sessions"))

				client, err := e.tryDialThrough(v1Header, nil)
				require.NoError(t, err, "others may come")
				e.wantReceives(t, client, "delivered")
			})
		})
	}
}

func TestPROXYHeaderFromAnUntrustedAddressIsRejected(t *testing.T) {
	const others = "trusted_proxies: [ 10.0.0.0/8 ], proxy_protocol: true"
	for name, header := range map[string]string{
		"version 1":    v1Header,
		"of a trusted": "PROXY TCP4 10.0.0.9 192.0.2.2 4711 80\r\n",
		"version 2":    v2Header(proxyV2, tcpOverIPv4, ipv4Block...),
		"local":        v2Header(localV2, 0),
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, others), toProbe)
				require.Contains(t, e.rawRequest(t, header+"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 400 Bad Request\r\n")

				send(e.dial(), "direct")
				address, _ := e.arrival().batch[0].MetaGet("cryo_remote_address")
				require.Equal(t, inMemory, address)
			})
		})
	}
}

func TestPROXYHeaderIsMalformedWhereItIsNotConfigured(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "trusted_proxies: [ 192.0.2.1 ]"), toProbe)
		require.Contains(t, e.rawRequest(t, v1Header+"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 400 Bad Request\r\n")
	})
}

func TestSlowPROXYHeaderDelaysNoOtherClient(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, behindProxies+", handshake_timeout: 3s"), toProbe)
		begin := time.Now()
		var slow []net.Conn
		for _, header := range []string{"", "P", "PROXY", signatureOfV2, v2Header(proxyV2, tcpOverIPv4, ipv4Block...)[:20]} {
			c, err := e.net.Dial(t.Context(), "tcp", somewhere)
			require.NoError(t, err)
			_, err = io.WriteString(c, header)
			require.NoError(t, err)
			slow = append(slow, c)
		}
		client, err := e.tryDialThrough(v1Header, nil)
		require.NoError(t, err)
		e.wantReceives(t, client, "delivered")
		require.Equal(t, begin, time.Now())
		for _, c := range slow[1:] {
			_, _ = io.Copy(io.Discard, c)
			require.LessOrEqual(t, time.Since(begin), 3*time.Second)
		}
		_, _ = io.Copy(io.Discard, slow[0])
		require.Equal(t, 3*time.Second, time.Since(begin))
	})
}

func TestAddressLimitAppliesToTheClientOfThePROXYHeader(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_sessions_per_address: 1, "+behindProxies), toProbe)
		from := func(address string) error {
			_, err := e.tryDialThrough("PROXY TCP4 "+address+" 192.0.2.2 4711 80\r\n", nil)
			return err
		}
		require.NoError(t, from("203.0.113.7"))
		var denied *cryo.HandshakeError
		require.ErrorAs(t, from("203.0.113.7"), &denied)
		require.Equal(t, http.StatusTooManyRequests, denied.StatusCode)
		e.log.want(t, "WARN Denied a client", "remote=203.0.113.7:4711")
		require.NoError(t, from("203.0.113.8"))
	})
}

func TestClientConnectsDespiteManyConnectionsOfAProxyWithoutAHeader(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, behindProxies+", max_sessions: 1, handshake_timeout: 10m"), toProbe)
		const over = 50
		for range minConnections + over {
			c, err := e.net.Dial(t.Context(), "tcp", somewhere)
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close() })
		}
		synctest.Wait()
		client, err := e.tryDialThrough(v1Header, nil)
		require.NoError(t, err)
		e.wantReceives(t, client, "delivered")
		e.log.want(t, "WARN Too many connections without a session: closed the oldest one from the busiest address", "remote="+inMemory)
		require.Zero(t, e.log.count(noProxyHeader), "they were closed for another reason")
	})
}

// Over real sockets, where a denial must arrive before the connection is closed.
func TestPROXYHeaderComesBeforeTLS(t *testing.T) {
	ca, dir := newAuthority(t, "ca"), t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "server", certFile, keyFile)
	for scheme, settings := range map[string]string{"ws": "", "wss": ", tls: { cert_file: " + certFile + ", key_file: " + keyFile + " }"} {
		t.Run(scheme, func(t *testing.T) {
			t.Cleanup(func() { checkLeaks(t) })
			e := newEngine(t)
			address := onSocket(t, e, "trusted_proxies: [ 127.0.0.1 ], proxy_protocol: true"+settings)
			for name, header := range map[string]string{"version 1": v1Header, "version 2": v2Header(proxyV2, tcpOverIPv4, ipv4Block...)} {
				opts := &cryo.DialOptions{Token: token, TLS: ca.trusting(), NetDial: func(ctx context.Context, network, address string) (net.Conn, error) {
					c, err := (&net.Dialer{}).DialContext(ctx, network, address)
					if err == nil {
						_, err = io.WriteString(c, header)
					}
					return c, err
				}}
				s, err := cryo.Dial(t.Context(), scheme+"://"+address, opts)
				require.NoError(t, err, name)
				m := send(s, strings.Repeat("x", 1<<20))
				a := e.arrival()
				remote, _ := a.batch[0].MetaGet("cryo_remote_address")
				require.Equal(t, "203.0.113.7:4711", remote)
				a.deliver()
				m.wantAcked(t, "delivered")
				require.NoError(t, s.Close(t.Context(), ""))

				opts.Token = "wrong"
				_, err = cryo.Dial(t.Context(), scheme+"://"+address, opts)
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
			}
			e.log.want(t, "WARN Denied a client", "remote=203.0.113.7:4711")
		})
	}
}

// A session half-closes its connection, so that its last bytes arrive.
func TestConnectionBehindAPROXYHeaderIsHalfClosed(t *testing.T) {
	far, near := cryotest.Pipe()
	_, err := io.WriteString(far, v1Header)
	require.NoError(t, err)
	trusted, err := trustedProxiesField.rule([]any{"192.0.2.1"})
	require.NoError(t, err)
	l := proxyListener{&oneConn{conn: near}, proxySettings{Trusted: trusted}, time.Minute, limitedLog{}}
	c, err := l.Accept()
	require.NoError(t, err)
	require.Equal(t, "203.0.113.7:4711", c.RemoteAddr().String())
	require.NoError(t, c.(interface{ CloseWrite() error }).CloseWrite())
	rest, err := io.ReadAll(far)
	require.NoError(t, err)
	require.Empty(t, rest)
	_, err = io.WriteString(far, "still read")
	require.NoError(t, err)
	require.NoError(t, far.Close())
	rest, err = io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, "still read", string(rest))
	require.NoError(t, c.Close())
}

// oneConn is a listener with one connection.
type oneConn struct {
	net.Listener
	conn net.Conn
}

func (l *oneConn) Accept() (net.Conn, error) { return l.conn, nil }

// FuzzPROXYHeader sends anything as a proxy. The address is one of TCP, and nothing that precedes the
// client's bytes is read as these.
func FuzzPROXYHeader(f *testing.F) {
	for _, header := range []string{
		"", v1Header, "PROXY UNKNOWN\r\n", "PROXY TCP6 ::1 ::1 1 2\r\n", signatureOfV2,
		v2Header(proxyV2, tcpOverIPv4, ipv4Block...), v2Header(proxyV2, tcpOverIPv6, ipv6Block...), v2Header(localV2, 0),
		v2Header(proxyV2, streamOverUnix, make([]byte, 216)...), v2Header(proxyV2, tcpOverIPv4, append(slices.Clone(ipv4Block), 4, 0, 1, 0)...),
	} {
		f.Add([]byte(header + "GET / HTTP/1.1\r\n\r\n"))
		f.Add([]byte(header))
	}
	trusted := proxySettings{PROXY: true}
	var err error
	trusted.Trusted, err = trustedProxiesField.rule([]any{"192.0.2.1"})
	require.NoError(f, err)
	log := service.MockResources().Logger()
	f.Fuzz(func(t *testing.T, sent []byte) {
		far, near := cryotest.Pipe()
		go func() {
			_, _ = far.Write(sent)
			_ = far.CloseWrite()
		}()
		l := proxyListener{&oneConn{conn: near}, trusted, time.Minute, newLimitedLog(log)}
		c, err := l.Accept()
		require.NoError(t, err)
		address, isTCP := c.RemoteAddr().(*net.TCPAddr)
		require.True(t, isTCP, "%T", c.RemoteAddr())
		require.NotNil(t, address.IP.To16())
		rest, err := io.ReadAll(c)
		if err != nil {
			require.Empty(t, rest)
			require.Equal(t, inMemory, address.String())
			return
		}
		require.True(t, bytes.HasSuffix(sent, rest))
		header, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(sent[:len(sent)-len(rest)])))
		require.NoError(t, err, "all that was not returned is the header")
		if header.Command.IsLocal() {
			require.Equal(t, inMemory, address.String())
		}
		require.NoError(t, c.Close())
		_, _ = io.Copy(io.Discard, far)
	})
}
