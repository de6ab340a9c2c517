package cryo_test

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// hosts are the names and addresses that the process's resolver knows during a test.
type hosts struct {
	mu        sync.Mutex
	addresses map[string][]string // IPv4, by name with a dot at its end
}

// resolve replaces the process's resolver until the test's end, so such tests are not parallel.
func resolve(t *testing.T) *hosts {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	h := &hosts{addresses: make(map[string][]string)}
	var serving sync.WaitGroup
	serving.Go(func() {
		b := make([]byte, 1500)
		for {
			n, client, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			if answer, err := h.answer(b[:n]); err == nil {
				_, _ = server.WriteTo(answer, client)
			}
		}
	})
	previous := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", server.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = previous
		_ = server.Close()
		serving.Wait()
	})
	return h
}

func (h *hosts) set(name string, addresses ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addresses[name+"."] = addresses
}

func (h *hosts) answer(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	m.Response, m.Additionals = true, nil
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, q := range m.Questions {
		if q.Type != dnsmessage.TypeA {
			continue
		}
		for _, address := range h.addresses[q.Name.String()] {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(address).As4()},
			})
		}
	}
	return m.Pack()
}

// dropPackets makes the system drop the connection requests to an address: its listener accepts
// nothing, and its backlog is full.
func dropPackets(t *testing.T, address, port string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = syscall.Close(fd) })
	at := netip.MustParseAddrPort(net.JoinHostPort(address, port))
	require.NoError(t, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}))
	require.NoError(t, syscall.Listen(fd, 0))
	c, err := net.Dial("tcp", at.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
}

func TestServerBehindUnreachableAddressesIsReached(t *testing.T) {
	target, sessions := serveTCP(t)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(target, "ws://"))
	require.NoError(t, err)
	h := resolve(t)
	addresses := []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}
	for _, address := range addresses {
		dropPackets(t, address, port)
	}
	h.set("cryo.test", append(addresses, "127.0.0.1")...)
	s, err := cryo.Dial(t.Context(), "ws://cryo.test:"+port, &cryo.DialOptions{Token: token})
	require.NoError(t, err)
	defer cut(s)
	wantConversation(t, s, <-sessions)
}

func TestEachAttemptResolvesTheName(t *testing.T) {
	target, sessions := serveTCP(t)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(target, "ws://"))
	require.NoError(t, err)
	h := resolve(t)
	h.set("cryo.test", "127.0.0.2") // where nothing listens
	c, err := cryo.NewClient("ws://cryo.test:"+port, &cryo.ClientOptions{DialOptions: cryo.DialOptions{Token: token}})
	require.NoError(t, err)
	defer cutClient(c)
	_, err = c.Connect(t.Context())
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	h.set("cryo.test")
	var unknown *net.DNSError
	_, err = c.Connect(t.Context())
	require.ErrorAs(t, err, &unknown)
	h.set("cryo.test", "127.0.0.1")
	s, err := c.Connect(t.Context())
	require.NoError(t, err)
	wantConversation(t, s, <-sessions)
}
