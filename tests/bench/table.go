package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
)

// goal is a row of the table: the ratio that a load must reach against another load, or its
// own value if there is none.
type goal struct {
	load, against string
	of            func(result) float64 // nil is the rate
	reach, sight  float64              // at least for ratios, at most without
}

var goals = []goal{
	{"in/cryo-bare", "in/websocket", nil, 6, 12},
	{"in/cryo", "in/websocket", nil, 4.5, 8},
	{"out/cryo", "out/websocket", nil, 5, 8},
	{"in/cryo-bare", "in/gathered", nil, 0.5, 0.9},
	{"out/cryo", "out/gathered", nil, 0.6, 1.1},
	{"in/cryo-bare-100B", "in/gathered-100B", nil, 0.5, 0.9},
	{"out/cryo-100B", "out/gathered-100B", nil, 0.6, 1.1},
	{"in/cryo_server-100-sessions", "in/cryo_server", nil, 0.8, 1},
	{"in/cryo-bare-one-at-a-time", "in/plain-one-at-a-time", nil, 0.65, 0.8},
	{"out/cryo-one-at-a-time", "out/plain-one-at-a-time", nil, 0.65, 0.8},
	{"in/cryo-bare-16KiB", "in/gathered-16KiB", nil, 0.65, 1},
	{"out/cryo-16KiB", "out/gathered-16KiB", nil, 0.65, 1},
	{"in/cryo-bare-64KiB", "in/gathered-64KiB", nil, 0.65, 1},
	{"out/cryo-64KiB", "out/gathered-64KiB", nil, 0.65, 1},
	{"in/cryo-stream", "in/gathered-64KiB", nil, 0.65, 1},
	{"out/cryo-stream", "out/gathered-64KiB", nil, 0.65, 1},
	{"in/cryo-bare", "", allocs, 10, 8.2},
	{"out/cryo", "", allocs, 8, 6.3},
	{"in/cryo", "", peak, 150, 150},
}

func printTable(rounds int, duration time.Duration) error {
	begin := time.Now()
	all, err := inTurn(loads, rounds, duration)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n\n", machine())
	fmt.Println("| load | against | messages a second | ratio | to reach | in sight | | CPU, ratio |")
	fmt.Println("|---|---|--:|--:|--:|--:|---|--:|")
	missed := 0
	for _, g := range goals {
		of := all[g.load]
		verdict := "pass"
		if g.against == "" {
			value := of.median(g.of)
			if value > g.reach {
				verdict = "MISS"
				missed++
			}
			unit := "allocations a message"
			if g.reach == 150 {
				unit = "MiB resident"
			}
			fmt.Printf("| %s | %s | %.0f | %.1f | ≤ %g | %g | %s | |\n", g.load, unit, of.median(rate), value, g.reach, g.sight, verdict)
			continue
		}
		against := all[g.against]
		value := ratio(of, against, rate)
		if value < g.reach {
			verdict = "MISS"
			missed++
		}
		fmt.Printf("| %s | %s | %.0f | %.2f | ≥ %g | %g | %s | %.2f |\n", g.load, g.against, of.median(rate), value, g.reach, g.sight, verdict,
			1/ratio(of, against, cpu))
	}
	fmt.Printf("\n%d of %d missed; %d rounds, %.0f s.\n\n", missed, len(goals), rounds, time.Since(begin).Seconds())
	fmt.Println("| all loads | messages a second | MB/s | CPU of both ends, µs a message | allocations a message | MiB resident |")
	fmt.Println("|---|--:|--:|--:|--:|--:|")
	for _, l := range loads {
		m := all[l.name]
		r := m.median(rate)
		fmt.Printf("| %s | %.0f | %.0f | %.2f | %.1f | %.0f |\n", l.name, r, r*float64(l.unit)/1e6, m.median(cpu), m.median(allocs), m.median(peak))
	}
	return nil
}

// machine describes the machine, with the model of its processors on Linux, and the date.
func machine() string {
	info, _ := os.ReadFile("/proc/cpuinfo") // of other systems: nothing
	_, model, _ := strings.Cut(string(info), "model name\t: ")
	if model, _, _ = strings.Cut(model, "\n"); model != "" {
		model += ", "
	}
	return fmt.Sprintf("%s%d cores, %s %s, %s; %s", model, runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version(), time.Now().Format("2 January 2006"))
}
