package main

import (
	"fmt"
	"slices"
	"time"
)

// growing is a table of loads with growing cost.
type growing struct {
	what  string
	loads []load
}

func growths() []growing {
	outstanding := growing{what: "messages outstanding, of 1 KiB"}
	for _, n := range []int{1, 4, 16, 64, 256, 1024, 4096} {
		name := fmt.Sprintf("outstanding-%d", n)
		yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_in_flight: %d }`, n)
		outstanding.loads = append(outstanding.loads,
			cryoInput(name, yaml, kib, n),
			cryoOutput(name, kib, min(n, batch), n))
	}
	payload := growing{what: "payload"}
	for _, n := range []int{16, 256, 4 * kib, 64 * kib, kib * kib, 16 * kib * kib} {
		name := "payload-" + bytesText(n)
		// As many as make some 64 MiB: a component that large ones pass is set up so.
		window := min(window, max(4, 64*kib*kib/n))
		yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_in_flight: %d, max_buffer_bytes: 134217728 }`, window)
		payload.loads = append(payload.loads,
			cryoInput(name, yaml, n, window),
			cryoOutput(name, n, min(window, batch), window))
	}
	sessions := growing{what: "sessions, with 1024 messages outstanding together, or one each"}
	for _, n := range []int{1, 10, 100, 1000, 10_000} {
		sessions.loads = append(sessions.loads, serverInput(fmt.Sprintf("sessions-%d", n), n, max(window, n)))
	}
	sessions.loads = append(sessions.loads, serverInput("sessions-100-with-64-each", 100, 100*64))
	together := growing{what: "messages a batch, with 1024 outstanding"}
	for _, n := range []int{1, 4, 16, 64, 256} {
		name := fmt.Sprintf("batch-%d", n)
		yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_batch_count: %d }`, n)
		together.loads = append(together.loads, cryoInput(name, yaml, kib, window), cryoOutput(name, kib, n, window))
	}
	return []growing{outstanding, payload, sessions, together}
}

func bytesText(n int) string {
	switch {
	case n >= kib*kib:
		return fmt.Sprintf("%dMiB", n/kib/kib)
	case n >= kib:
		return fmt.Sprintf("%dKiB", n/kib)
	default:
		return fmt.Sprintf("%dB", n)
	}
}

// allLoads are the loads of all tables.
func allLoads() []load {
	all := slices.Clone(loads)
	for _, g := range growths() {
		all = append(all, g.loads...)
	}
	return all
}

func printGrowth(rounds int, duration time.Duration) error {
	fmt.Printf("%s\n", machine())
	for _, g := range growths() {
		all, err := inTurn(g.loads, rounds, duration)
		if err != nil {
			return err
		}
		fmt.Printf("\n| %s | messages a second | MB/s | CPU of both ends, µs a message | allocations a message | MiB resident |\n|---|--:|--:|--:|--:|--:|\n", g.what)
		for _, l := range g.loads {
			m := all[l.name]
			r := m.median(rate)
			fmt.Printf("| %s | %.0f | %.0f | %.2f | %.1f | %.0f |\n", l.name, r, r*float64(l.unit)/1e6, m.median(cpu), m.median(allocs), m.median(peak))
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
	fmt.Printf("\nInput cryo → drop at half its rate, %.0f messages a second: from send to acknowledgement %.0f µs at the median, %.0f µs at the 99th percentile.\n",
		median(rates), median(p50), median(p99))
	return nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
