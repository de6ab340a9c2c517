package address

import (
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReservedAddressRefusesConnectionsUntilUsed(t *testing.T) {
	address, release, err := Reserve()
	require.NoError(t, err)
	defer release.Close()
	for range 3 { // as a program does that is restarted
		_, err = net.Dial("tcp", address)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		l, err := net.Listen("tcp", address)
		require.NoError(t, err)
		conn, err := net.Dial("tcp", address)
		require.NoError(t, err)
		require.NoError(t, conn.Close())
		require.NoError(t, l.Close())
	}
}
