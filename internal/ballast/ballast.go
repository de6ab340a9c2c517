// Package ballast makes Go's garbage collector run less often while little memory is in
// use.
//
// By default it runs when as much has been allocated as is in use. A few busy sessions use
// little and allocate much, so that it would run many times a second: see
// docs/development/performance.md, "Balance CPU time and memory".
package ballast

import (
	"math"
	"os"
	"runtime/debug"
)

// The collector runs when half as much has been allocated as is in use, including the
// ballast: after 32 MiB if little else is in use. With many idle sessions that leaves less
// garbage than Go's default percentage, 100.
const (
	size    = 64 << 20
	percent = 50
)

// limited is the percentage where GOMEMLIMIT bounds the memory. Ballast would count
// against that.
const limited = 400

// memory counts as in use, but is never accessed, so that it is not resident. It consists of
// pieces because the runtime zeroes a whole piece if a part of it was in use before.
var memory [size >> 20][]byte

// Load sets the collector's percentage and allocates the ballast, for the lifetime of the
// process, unless the user has set GOGC. With GOMEMLIMIT it sets a percentage only.
func Load() {
	switch {
	case os.Getenv("GOGC") != "":
	case debug.SetMemoryLimit(-1) != math.MaxInt64:
		debug.SetGCPercent(limited)
	default:
		debug.SetGCPercent(percent)
		for i := range memory {
			memory[i] = make([]byte, size/len(memory))
			giveBack(memory[i])
		}
	}
}
