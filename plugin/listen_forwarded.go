package plugin

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// The addresses of clients that connect through reverse proxies.

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
			Description("The addresses or networks of reverse proxies that are trusted to report the address of a client, in `forwarded_header` or by `proxy_protocol`. The reported address is used in `cryo_remote_address`, `authorize`, `max_sessions_per_address` and the log. Do not add networks from which clients connect directly.").
			Default([]any{}).
			Example([]string{"10.0.0.0/8", "127.0.0.1", "fd00::/8"}).
			Advanced(),
		forwardedHeaderField.config().
			Description("The header in which the trusted proxies report the address of a client. Every trusted proxy must set this header: a proxy that sets only the other one may pass this one on unchanged, as a client sent it.").
			Default(headerXForwardedFor).
			Advanced(),
		proxyProtocolField.config().
			Description("Whether the trusted proxies begin each connection with a PROXY protocol header, version 1 or 2, as TCP load balancers do. Their health checks must send it too, and connections from other addresses must not. If the address in it is that of a trusted proxy, `forwarded_header` applies as well.").
			Advanced(),
	}
}

type proxySettings struct {
	Trusted []netip.Prefix `field:"trusted_proxies"`
	Header  string         `field:"forwarded_header"`
	PROXY   bool           `field:"proxy_protocol"`
}

func readProxySettings(r *settingsReader) proxySettings {
	s := proxySettings{Trusted: trustedProxiesField.read(r), Header: forwardedHeaderField.read(r), PROXY: proxyProtocolField.read(r)}
	if r.err == nil && s.PROXY && len(s.Trusted) == 0 {
		r.err = fmt.Errorf("field %s needs %s: only the proxies in that list are trusted to send the header", fieldProxyProtocol, fieldTrustedProxies)
	}
	return s
}

// parseNetwork parses an IP address or a network. Like parseHop, it converts IPv4-mapped IPv6
// addresses to IPv4.
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

// clientAddress returns the address of the client: the last one that is not the address of a
// trusted proxy. Each proxy appends the address of its peer, so the header is read from the
// end. Addresses that the client itself has sent precede its real address, and are not read.
func (s proxySettings) clientAddress(r *http.Request) string {
	address := r.RemoteAddr
	if !s.trusts(address) {
		return address
	}
	for _, hop := range slices.Backward(s.hops(r.Header)) {
		if _, ok := parseHop(hop); !ok {
			break // not an address, but for example "unknown"
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

// forwardedFor returns the address in an element of Forwarded (RFC 7239), such as
// for="[2001:db8::1]:4711";proto=https. An address contains neither a comma nor a semicolon.
func forwardedFor(element string) string {
	for pair := range strings.SplitSeq(element, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if strings.EqualFold(name, "for") {
			return strings.Trim(value, `"`)
		}
	}
	return ""
}

// withoutBrackets removes the brackets that some proxies add to an IPv6 address without a port.
func withoutBrackets(hop string) string {
	if strings.HasSuffix(hop, "]") {
		return strings.Trim(hop, "[]")
	}
	return hop
}

// parseHop parses an IP address with or without a port. It removes the zone, because
// netip.Prefix.Contains is false for an address with a zone.
func parseHop(hop string) (netip.Addr, bool) {
	if withPort, err := netip.ParseAddrPort(hop); err == nil {
		return withPort.Addr().Unmap().WithZone(""), true
	}
	ip, err := netip.ParseAddr(hop)
	return ip.Unmap().WithZone(""), err == nil
}
