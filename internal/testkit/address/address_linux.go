package address

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// reserve binds a socket on which it never listens. A connection to it is refused.
//
// No other program is assigned the port: for a bind or a connect without a port, the
// kernel passes over every port that a socket is bound to. The program that is given
// the address can bind to it nevertheless, because Linux lets sockets share an address
// if all of them have SO_REUSEADDR and none of them listens; Go, Node and most servers
// set that option.
func reserve() (string, io.Closer, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", nil, os.NewSyscallError("socket", err)
	}
	socket := os.NewFile(uintptr(fd), "reserved address")
	err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	if err == nil {
		err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	var bound syscall.Sockaddr
	if err == nil {
		bound, err = syscall.Getsockname(fd)
	}
	if err != nil {
		_ = socket.Close()
		return "", nil, fmt.Errorf("binding a socket: %w", err)
	}
	return fmt.Sprintf("127.0.0.1:%d", bound.(*syscall.SockaddrInet4).Port), socket, nil
}
