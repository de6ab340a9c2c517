package ws

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// attemptDelay is the time after which the next address of a host is dialled, too, while the
	// others have not answered (RFC 8305, 5: Connection Attempt Delay).
	attemptDelay = 250 * time.Millisecond

	// maxAddresses bounds the addresses of a host that are dialled, and so the connections that are
	// opened at the same time.
	maxAddresses = 64
)

// hostDialer dials the addresses of a host as RFC 8305 (Happy Eyeballs) describes: of both families
// in turn, one after the other, without waiting for the end of the previous attempts. A net.Dialer
// divides its time among the addresses of a family instead, in parts of at least 2 s: behind
// some dead ones, to which packets are lost, it never reaches the others.
type hostDialer struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	dial   netDialFunc // dials an address without a name
}

// dialHost resolves the host anew each time, because its addresses may have changed.
func dialHost(ctx context.Context, network, address string) (net.Conn, error) {
	d := hostDialer{lookup: net.DefaultResolver.LookupNetIP, dial: (&net.Dialer{}).DialContext}
	return d.dialContext(ctx, network, address)
}

func (d *hostDialer) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return d.dial(ctx, network, address)
	}
	ips, err := d.lookup(ctx, "ip", host)
	if err == nil && len(ips) == 0 {
		err = &net.DNSError{Err: "no addresses", Name: host}
	}
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err} // as a net.Dialer
	}
	var addresses []string
	for _, ip := range alternate(ips) {
		addresses = append(addresses, net.JoinHostPort(ip.String(), port))
	}
	return d.race(ctx, network, addresses[:min(len(addresses), maxAddresses)])
}

// alternate sorts addresses by family in turn, beginning with that of the first one. Within a family,
// the order of the resolver is kept.
func alternate(ips []netip.Addr) []netip.Addr {
	var families [2][]netip.Addr // that of the first address, and the other
	for _, ip := range ips {
		ip = ip.Unmap()
		family := 0
		if ip.Is4() != ips[0].Unmap().Is4() {
			family = 1
		}
		families[family] = append(families[family], ip)
	}
	var sorted []netip.Addr
	for i := range max(len(families[0]), len(families[1])) {
		for _, family := range families {
			if i < len(family) {
				sorted = append(sorted, family[i])
			}
		}
	}
	return sorted
}

// dialled is the result of dialling an address.
type dialled struct {
	conn net.Conn
	err  error
}

// race dials the addresses and returns the first connection. The next address is dialled after
// attemptDelay, or when an attempt has failed. Of many addresses, the delay is shorter, so that each
// has at least half of the context's time. If all fail, the error is that of the first failure.
func (d *hostDialer) race(ctx context.Context, network string, addresses []string) (net.Conn, error) {
	delay := attemptDelay
	if deadline, ok := ctx.Deadline(); ok {
		delay = min(delay, time.Until(deadline)/2/time.Duration(len(addresses)))
	}
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan dialled, len(addresses))
	var attempts sync.WaitGroup
	defer func() { // the other attempts end, and connections that they have made
		cancel()
		attempts.Wait()
		close(results)
		for r := range results {
			if r.conn != nil {
				_ = r.conn.Close()
			}
		}
	}()
	var firstErr error
	next := time.NewTimer(0)
	defer next.Stop()
	for started, failed := 0, 0; ; {
		select {
		case <-next.C:
			address := addresses[started]
			attempts.Go(func() {
				c, err := d.dial(ctx, network, address)
				results <- dialled{c, err}
			})
			if started++; started < len(addresses) {
				next.Reset(delay)
			}
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			firstErr = cmp.Or(firstErr, r.err)
			if failed++; failed == len(addresses) {
				return nil, firstErr
			}
			if started < len(addresses) {
				next.Reset(0)
			}
		}
	}
}
