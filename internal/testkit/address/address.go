// Package address reserves TCP addresses for programs that do not report which port
// they have chosen.
package address

import "io"

// Reserve returns an address of 127.0.0.1 on which nobody listens. Until the closer is
// closed, a program that is given the address can listen on it, repeatedly, and no
// other program is assigned its port.
func Reserve() (address string, release io.Closer, err error) { return reserve() }
