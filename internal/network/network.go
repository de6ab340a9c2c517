// Package network groups peers by their addresses, for limits per peer.
package network

import (
	"net/netip"
	"strings"
)

// Of returns the network of an IP address with or without a port: one IPv4 address, or the IPv6
// network of 64 bits, all of which one peer usually has. All other texts have the zero value, and so
// are one peer.
func Of(address string) netip.Prefix {
	ip, err := netip.ParseAddr(strings.Trim(address, "[]"))
	if withPort, portErr := netip.ParseAddrPort(address); portErr == nil {
		ip, err = withPort.Addr(), nil
	}
	if err != nil {
		return netip.Prefix{}
	}
	ip = ip.Unmap().WithZone("")
	network, _ := ip.Prefix(min(64, ip.BitLen())) // always valid
	return network
}
