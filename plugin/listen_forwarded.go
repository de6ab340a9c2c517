package plugin

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Clients behind reverse proxies.

const (
	fieldTrustedProxies  = "trusted_proxies"
	fieldForwardedHeader = "forwarded_header"

	headerXForwardedFor = "x-forwarded-for"
	headerForwarded     = "forwarded"
)

var (
	trustedProxiesField = listOf(fieldTrustedProxies, func(names []string) (networks []netip.Prefix, err error) {
		for _, name := range names {
			network, err := parseNetwork(name)
			if err != nil {
				return nil, fmt.Errorf("field %s: %q is neither an IP address nor a network such as 10.0.0.0/8", fieldTrustedProxies, name)
			}
			networks = append(networks, network)
		}
		return networks, nil
	})
	forwardedHeaderField = oneOf(fieldForwardedHeader, headerXForwardedFor, headerForwarded)
)

func proxyFields() []*service.ConfigField {
	return []*service.ConfigField{
		trustedProxiesField.config().
			Description("The reverse proxies whose word on a client's address is taken: IP addresses, or networks such as `10.0.0.0/8`. For a client that comes through one of these, the address that it tells is what `cryo_remote_address`, `authorize`, `max_sessions_per_address` and the log have. Anybody else's word is ignored, so don't name networks from which clients come.").
			Default([]any{}).
			Example([]string{"10.0.0.0/8", "127.0.0.1", "fd00::/8"}).
			Advanced(),
		forwardedHeaderField.config().
			Description("The header in which the trusted proxies tell a client's address. It is one that each of them sets: of the other, what a client has written may come through.").
			Default(headerXForwardedFor).
			Advanced(),
	}
}

type proxySettings struct {
	Trusted []netip.Prefix `field:"trusted_proxies"`
	Header  string         `field:"forwarded_header"`
}

func readProxySettings(r *settingsReader) proxySettings {
	return proxySettings{Trusted: trustedProxiesField.read(r), Header: forwardedHeaderField.read(r)}
}

// parseNetwork reads an IP address or a network. IPv4 in IPv6 is IPv4, as it is
// of the addresses that parseHop gives.
func parseNetwork(name string) (netip.Prefix, error) {
	if ip, err := netip.ParseAddr(name); err == nil {
		ip = ip.Unmap()
		return netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	network, err := netip.ParsePrefix(name)
	if ip := network.Addr(); ip.Is4In6() && network.Bits() >= 96 {
		network = netip.PrefixFrom(ip.Unmap(), network.Bits()-96)
	}
	return network.Masked(), err
}

func (s proxySettings) trusts(address string) bool {
	ip, ok := parseHop(address)
	for _, network := range s.Trusted {
		if ok && network.Contains(ip) {
			return true
		}
	}
	return false
}

// clientAddress is where a request comes from: the address nearest to us for
// which no trusted proxy stands. Each proxy appends the address that it saw, so
// they are read from the end, and what a client has written itself comes before
// its own and is never read.
func (s proxySettings) clientAddress(r *http.Request) string {
	address := r.RemoteAddr
	if !s.trusts(address) {
		return address
	}
	for _, hop := range slices.Backward(s.hops(r.Header)) {
		if _, ok := parseHop(hop); !ok {
			break // "unknown" or a made-up name: a proxy knows no more
		}
		if address = hop; !s.trusts(address) {
			break
		}
	}
	return address
}

func (s proxySettings) hops(h http.Header) []string {
	var hops []string
	for part := range strings.SplitSeq(strings.Join(h.Values(s.Header), ","), ",") {
		if s.Header == headerForwarded {
			part = forwardedFor(part)
		}
		hops = append(hops, withoutBrackets(strings.TrimSpace(part)))
	}
	return hops
}

// forwardedFor finds the address in an element of Forwarded (RFC 7239), such as
// for="[2001:db8::1]:4711";proto=https. No address has a comma or a semicolon.
func forwardedFor(element string) string {
	for pair := range strings.SplitSeq(element, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if strings.EqualFold(name, "for") {
			return strings.Trim(value, `"`)
		}
	}
	return ""
}

// withoutBrackets takes those off an IPv6 address that has no port to be told from,
// so that it is the same however a proxy writes it.
func withoutBrackets(hop string) string {
	if strings.HasSuffix(hop, "]") {
		return strings.Trim(hop, "[]")
	}
	return hop
}

// parseHop reads an IP address with or without a port. It is without its zone: no
// network has one.
func parseHop(hop string) (netip.Addr, bool) {
	if withPort, err := netip.ParseAddrPort(hop); err == nil {
		return withPort.Addr().Unmap().WithZone(""), true
	}
	ip, err := netip.ParseAddr(hop)
	return ip.Unmap().WithZone(""), err == nil
}
