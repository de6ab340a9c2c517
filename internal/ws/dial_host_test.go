package ws

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// What the addresses of a host in these tests do.
const (
	dead    = "192.0.2.1" // packets to it are lost
	dead6   = "2001:db8::1"
	refused = "192.0.2.2"
	alive   = "192.0.2.3"
	alive6  = "2001:db8::3"
	slow    = "192.0.2.4" // answers after a second
)

// hostOf returns a dialer for a host with addresses, and a count of the open connections.
func hostOf(ips ...string) (d *hostDialer, open *atomic.Int64) {
	open = new(atomic.Int64)
	lookup := func(context.Context, string, string) ([]netip.Addr, error) {
		var parsed []netip.Addr
		for _, ip := range ips {
			parsed = append(parsed, netip.MustParseAddr(ip))
		}
		return parsed, nil
	}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		switch host {
		case refused:
			return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
		case dead, dead6:
			<-ctx.Done()
			return nil, &net.OpError{Op: "dial", Net: network, Err: ctx.Err()}
		case slow: // and does not notice that it is cancelled
			time.Sleep(time.Second)
		}
		open.Add(1)
		return &countedConn{address: address, open: open}, nil
	}
	return &hostDialer{lookup, dial}, open
}

type countedConn struct {
	net.Conn
	address string
	open    *atomic.Int64
}

func (c *countedConn) Close() error {
	c.open.Add(-1)
	return nil
}

// connect dials a host with a timeout of 5 s.
func connect(t *testing.T, d *hostDialer) (address string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := d.dialContext(ctx, "tcp", "cryo.example.com:8080")
	if err != nil {
		return "", err
	}
	return c.(*countedConn).address, nil
}

func TestUnreachableAddressesBarelyDelayAConnection(t *testing.T) {
	for _, tt := range []struct {
		ips  []string
		want string
		wait time.Duration
	}{
		{[]string{alive}, alive, 0},
		{[]string{alive, dead, dead}, alive, 0},
		{[]string{dead, alive}, alive, 250 * time.Millisecond},
		{[]string{dead, dead, dead, dead, alive}, alive, time.Second},
		{[]string{dead, dead, dead, dead, dead, dead, dead, dead, alive}, alive, 2 * time.Second},
		{[]string{refused, refused, refused, alive}, alive, 0},
		{[]string{dead, refused, alive}, alive, 250 * time.Millisecond},
		{[]string{dead6, dead6, dead6, dead6, alive}, alive, 250 * time.Millisecond},
		{[]string{dead, dead, dead, alive6}, alive6, 250 * time.Millisecond},
		{[]string{"::ffff:" + dead, "::ffff:" + dead, dead6, alive}, alive, 750 * time.Millisecond},
		{[]string{slow, alive}, alive, 250 * time.Millisecond},
		{[]string{slow, dead}, slow, time.Second},
		{append(slices.Repeat([]string{dead}, 63), alive), alive, 2461 * time.Millisecond},
	} {
		t.Run(fmt.Sprintf("%.80v", fmt.Sprint(tt.ips)), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, open := hostOf(tt.ips...)
				begin := time.Now()
				address, err := connect(t, d)
				require.NoError(t, err)
				host, port, err := net.SplitHostPort(address)
				require.NoError(t, err)
				require.Equal(t, tt.want, host)
				require.Equal(t, "8080", port)
				wait := time.Since(begin)
				if slices.Contains(tt.ips, slow) { // its dialer waits for it
					wait = min(wait, tt.wait)
				}
				require.Equal(t, tt.wait, wait.Round(time.Millisecond))
				require.EqualValues(t, 1, open.Load(), "the other connections are closed")
			})
		})
	}
}

func TestDialFailsIfNoAddressOfTheHostResponds(t *testing.T) {
	for _, tt := range []struct {
		ips  []string
		want error
		wait time.Duration
	}{
		{[]string{refused}, syscall.ECONNREFUSED, 0},
		{[]string{refused, refused}, syscall.ECONNREFUSED, 0},
		{[]string{dead, refused}, syscall.ECONNREFUSED, 5 * time.Second},
		{[]string{dead, dead6}, context.DeadlineExceeded, 5 * time.Second},
		{append(slices.Repeat([]string{dead}, maxAddresses), alive), context.DeadlineExceeded, 5 * time.Second},
	} {
		t.Run(fmt.Sprintf("%.80v", fmt.Sprint(tt.ips)), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, open := hostOf(tt.ips...)
				begin := time.Now()
				_, err := connect(t, d)
				require.ErrorIs(t, err, tt.want)
				require.Equal(t, tt.wait, time.Since(begin))
				require.Zero(t, open.Load())
			})
		})
	}
}

func TestHostThatCannotBeResolvedIsReportedAsByANetDialer(t *testing.T) {
	notFound := &net.DNSError{Err: "no such host", Name: "cryo.example.com", IsNotFound: true}
	d := &hostDialer{lookup: func(context.Context, string, string) ([]netip.Addr, error) { return nil, notFound }}
	_, err := d.dialContext(t.Context(), "tcp", "cryo.example.com:80")
	require.EqualError(t, err, "dial tcp: lookup cryo.example.com: no such host")
	require.ErrorIs(t, err, notFound)
}

func TestAddressIsDialledWithoutALookup(t *testing.T) {
	for _, address := range []string{"192.0.2.1:80", "[2001:db8::1]:80", "[fe80::1%eth0]:80"} {
		dialledAddress := ""
		d := &hostDialer{
			lookup: func(context.Context, string, string) ([]netip.Addr, error) { return nil, errors.New("looked up") },
			dial: func(_ context.Context, _, address string) (net.Conn, error) {
				dialledAddress = address
				return &countedConn{}, nil
			},
		}
		_, err := d.dialContext(t.Context(), "tcp", address)
		require.NoError(t, err)
		require.Equal(t, address, dialledAddress)
	}
}
