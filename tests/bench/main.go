// Command bench measures the components in real pipelines, beside the engine's
// own components and loops over the WebSocket library, and prints a table:
//
//	go run ./tests/bench
//	go run ./tests/bench -growth
//	go run ./tests/bench -growth -results docs/images/growth.json
//	go run ./tests/bench -results docs/images/growth.json
//
// The third one stores its results, and draws the plots of docs/development/performance.md beside
// them. The last one draws stored results again, without measuring.
//
// The same loads are benchmarks for go test -bench and benchstat. In the tables
// every load runs in its own process, against an efficient peer in another
// one, over the loopback interface. See docs/development/performance.md.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/ballast"
)

func main() {
	ballast.Load() // as the binary does; the peers and the loops have it too
	if isPeer() {
		return
	}
	rounds := flag.Int("rounds", 5, "how often everything is measured, in turn")
	duration := flag.Duration("time", 300*time.Millisecond, "how long each load is measured in a round, about")
	growth := flag.Bool("growth", false, "print how cost grows with unacknowledged messages, payload, sessions and batches; and the latency at half the rate")
	results := flag.String("results", "", "the file of the results of -growth, and the plots beside it: written with -growth; without it, the plots are drawn again")
	one := flag.String("load", "", "measure this load alone, once, and print the result as JSON")
	profile := flag.String("cpuprofile", "", "write a CPU profile of the one load there")
	flag.Parse()
	var err error
	switch {
	case *one != "":
		err = printOne(*one, *duration, *profile)
	case *growth:
		err = printGrowth(*rounds, *duration, *results)
	case *results != "":
		err = drawResults(*results)
	default:
		err = printTable(*rounds, *duration)
	}
	if err != nil {
		fatal(err)
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}
