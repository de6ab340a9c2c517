package network_test

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/network"
)

func TestPeersAreGroupedByTheirNetwork(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1":               "192.0.2.1/32",
		"192.0.2.1:80":            "192.0.2.1/32",
		"::ffff:192.0.2.1":        "192.0.2.1/32",
		"[::ffff:192.0.2.1]:80":   "192.0.2.1/32",
		"2001:db8:1:2:3::4":       "2001:db8:1:2::/64",
		"[2001:db8:1:2:5::6]":     "2001:db8:1:2::/64",
		"[2001:db8:1:2:5::6]:80":  "2001:db8:1:2::/64",
		"[fe80::1%eth0]:80":       "fe80::/64",
		"[2001:db8:1:3:5::6]:443": "2001:db8:1:3::/64",
	} {
		require.Equal(t, netip.MustParsePrefix(want), network.Of(address), address)
	}
	for _, address := range []string{"", "@", "pipe", "unknown:80", "192.0.2.1:http"} {
		require.Zero(t, network.Of(address), address)
	}
}
