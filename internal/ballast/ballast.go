// Package ballast keeps Go's garbage collector from running every few megabytes.
//
// By default it runs when as much has been allocated as is in use. A few sessions
// at full speed use some four megabytes and allocate hundreds a second. With
// 24 MiB of ballast the input took 0.65 of the CPU time for messages of 1 KiB, 0.6 for
// those of 64 KiB, and 0.7 for streams.
package ballast

import (
	"math"
	"os"
	"runtime/debug"
)

// The collector runs when half as much has been allocated as is in use, the ballast
// included: after 32 MiB where little else is. With many sessions, most of which are
// idle, that leaves less garbage than Go's default, as much as is in use: beside
// that and 24 MiB of ballast, ten thousand took 28.5 KiB each after 25 broadcasts in
// place of 31.8, and a busy input 1.02 to 1.05 times as many messages. 96 MiB gave
// little more, and the process held up to a hundred MiB more.
const (
	size    = 64 << 20
	percent = 50
)

// limited is the percentage where GOMEMLIMIT bounds the memory. Ballast would count
// against that.
const limited = 400

// memory counts as in use, and is never touched, so the system has to provide none. It
// is in pieces because the runtime writes zeros to all of a piece if a part of it was in
// use before.
var memory [size >> 20][]byte

// Load sets the collector's percentage and takes the ballast aboard, for the rest of
// the process's life, unless GOGC says that the user has chosen. With a GOMEMLIMIT
// there is a percentage and no ballast.
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
