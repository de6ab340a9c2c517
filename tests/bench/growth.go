package main

import (
	"fmt"
	"slices"
	"time"
)

// growing is a table and a plot of loads with growing cost.
type growing struct {
	name   string // name of the file with the plot
	title  string
	axis   string // what grows
	tick   func(float64) string
	points []point
	panels []panel
}

// point is a load of a plot, on a line of that name.
type point struct {
	load
	line string
	at   float64 // the value of what grows
}

// panel is a diagram of a plot.
type panel struct {
	title string
	of    func(point, result) float64
}

var (
	ratePanel   = panel{"messages per second", func(_ point, r result) float64 { return r.Rate }}
	bytesPanel  = panel{"MB per second", func(p point, r result) float64 { return r.Rate * float64(p.unit) / 1e6 }}
	cpuPanel    = panel{"CPU time of both ends, µs per message", func(_ point, r result) float64 { return r.CPU }}
	memoryPanel = panel{"resident memory, MiB", func(_ point, r result) float64 { return r.Peak }}
)

func growths() []growing {
	outstanding := growing{
		name: "outstanding", title: "More unacknowledged messages", axis: "unacknowledged messages, 1 KiB each",
		tick: numberText, panels: []panel{ratePanel, cpuPanel},
	}
	for _, n := range []int{1, 4, 16, 64, 256, 1024, 4096} {
		name := fmt.Sprintf("outstanding-%d", n)
		yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_in_flight: %d }`, n)
		outstanding.add(n, cryoInput(name, yaml, kib, n), cryoOutput(name, kib, min(n, batch), n))
	}
	payload := growing{
		name: "payload", title: "Larger messages", axis: "payload",
		tick: func(v float64) string { return bytesText(int(v), " ") }, panels: []panel{bytesPanel, cpuPanel},
	}
	for _, n := range []int{16, 256, 4 * kib, 64 * kib, kib * kib, 16 * kib * kib} {
		name := "payload-" + bytesText(n, "")
		// As many as make some 64 MiB: a component that large ones pass is set up so.
		window := min(window, max(4, 64*kib*kib/n))
		yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_in_flight: %d, max_buffer_bytes: 134217728 }`, window)
		payload.add(n, cryoInput(name, yaml, n, window), cryoOutput(name, n, min(window, batch), window))
	}
	sessions := growing{
		name: "sessions", title: "More sessions", axis: "sessions of a cryo_server input",
		tick: numberText, panels: []panel{ratePanel, memoryPanel},
	}
	together, each := "1,024 unacknowledged messages in all, at least one per session", "64 unacknowledged messages per session"
	for _, n := range []int{1, 10, 100, 1000, 10_000} {
		sessions.points = append(sessions.points, point{serverInput(fmt.Sprintf("sessions-%d", n), n, max(window, n)), together, float64(n)})
	}
	sessions.points = append(sessions.points, point{serverInput("sessions-100-with-64-each", 100, 100*64), each, 100})
	batches := growing{
		name: "batch", title: "Larger batches", axis: "messages per batch, 1,024 unacknowledged",
		tick: numberText, panels: []panel{ratePanel, cpuPanel},
	}
	for _, n := range []int{1, 4, 16, 64, 256} {
		name := fmt.Sprintf("batch-%d", n)
		yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_batch_count: %d }`, n)
		batches.add(n, cryoInput(name, yaml, kib, window), cryoOutput(name, kib, n, window))
	}
	return []growing{outstanding, payload, sessions, batches}
}

// add adds an input and an output.
func (g *growing) add(at int, in, out load) {
	g.points = append(g.points, point{in, "input cryo", float64(at)}, point{out, "output cryo", float64(at)})
}

func (g growing) loads() []load {
	all := make([]load, len(g.points))
	for i, p := range g.points {
		all[i] = p.load
	}
	return all
}

// numberText returns a number below a million, with a comma after the thousands.
func numberText(v float64) string {
	if n := int(v); n >= 1000 {
		return fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	return fmt.Sprint(int(v))
}

// bytesText returns a number of bytes with a unit after the separator.
func bytesText(n int, separator string) string {
	switch {
	case n >= kib*kib:
		return fmt.Sprintf("%d%sMiB", n/kib/kib, separator)
	case n >= kib:
		return fmt.Sprintf("%d%sKiB", n/kib, separator)
	default:
		return fmt.Sprintf("%d%sB", n, separator)
	}
}

// allLoads are the loads of all tables.
func allLoads() []load {
	all := slices.Clone(loads)
	for _, g := range growths() {
		all = append(all, g.loads()...)
	}
	return all
}

// printGrowth measures the loads of all plots, and the latency. If path is not empty, it writes the
// results there, and draws the plots beside them.
func printGrowth(rounds int, duration time.Duration, path string) error {
	fmt.Printf("%s\n", machine())
	results := growthResults{Machine: machine(), Loads: make(map[string]result)}
	for _, g := range growths() {
		all, err := inTurn(g.loads(), rounds, duration)
		if err != nil {
			return err
		}
		fmt.Printf("\n| %s: %s | messages per second | MB/s | CPU of both ends, µs per message | allocations per message | MiB resident |\n|---|--:|--:|--:|--:|--:|\n", g.title, g.axis)
		for _, l := range g.loads() {
			m := all[l.name]
			r := result{Rate: m.median(rate), CPU: m.median(cpu), Allocs: m.median(allocs), Peak: m.median(peak)}
			results.Loads[l.name] = r
			fmt.Printf("| %s | %.0f | %.0f | %.2f | %.1f | %.0f |\n", l.name, r.Rate, r.Rate*float64(l.unit)/1e6, r.CPU, r.Allocs, r.Peak)
		}
	}
	if path != "" {
		if err := results.write(path); err != nil {
			return err
		}
		if err := drawResults(path); err != nil {
			return err
		}
	}
	return printLatency(rounds, duration)
}

// printLatency measures the latency at half of a rate.
func printLatency(rounds int, duration time.Duration) error {
	l := cryoInput("cryo", defaultInput, kib, window)
	var p50, p99, rates []float64
	for range rounds {
		run, err := l.start()
		if err != nil {
			return err
		}
		n, err := enough(run, 16, duration)
		if err != nil {
			return err
		}
		half := float64(n) / duration.Seconds() / 2
		r, err := run.peer.order("pace %d %g", n, half)
		if err != nil {
			return err
		}
		run.stop()
		slices.Sort(r.Latency)
		rates = append(rates, half)
		p50 = append(p50, micros(r.Latency[len(r.Latency)/2]))
		p99 = append(p99, micros(r.Latency[len(r.Latency)*99/100]))
	}
	fmt.Printf("\nThe cryo input to drop at half its rate, %.0f messages a second: from send to acknowledgement %.0f µs at the median, %.0f µs at the 99th percentile.\n",
		median(rates), median(p50), median(p99))
	return nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
