package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"time"
)

// result is the result of one run of a load.
type result struct {
	Rate   float64 `json:"rate"`             // messages a second
	CPU    float64 `json:"cpu"`              // of both processes, in µs a message
	Allocs float64 `json:"allocs,omitempty"` // allocations per message, including those of the engine
	Peak   float64 `json:"peak,omitempty"`   // maximum resident MiB of the subject
}

// measure runs a load for about a duration, after runs that determine the number of
// messages.
func measure(l load, duration time.Duration, profile string) (r result, err error) {
	run, err := l.start()
	if err != nil {
		return r, err
	}
	defer run.stop()
	n, err := enough(run, max(16, l.sessions), duration)
	if err != nil {
		return r, err
	}
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return r, err
		}
		defer func() { _ = f.Close() }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return r, err
		}
		defer pprof.StopCPUProfile()
	}

	peerBefore, err := run.peer.order("report")
	if err != nil {
		return r, err
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu, begin := cpuTime(), time.Now()
	if err := run.do(n); err != nil {
		return r, err
	}
	took := time.Since(begin)
	cpu = cpuTime() - cpu
	runtime.ReadMemStats(&after)
	peerAfter, err := run.peer.order("report")
	if err != nil {
		return r, err
	}
	cpu += peerAfter.CPU - peerBefore.CPU
	return result{
		Rate:   float64(n) / took.Seconds(),
		CPU:    float64(cpu.Microseconds()) / float64(n),
		Allocs: float64(after.Mallocs-before.Mallocs) / float64(n),
		Peak:   peakMemory(),
	}, nil
}

// enough returns how many messages take about a duration, beginning with n. The first run
// is not counted: it waits for the sessions.
func enough(run *running, n int, duration time.Duration) (int, error) {
	if err := run.do(n); err != nil {
		return 0, err
	}
	for ; ; n *= 4 {
		begin := time.Now()
		if err := run.do(n); err != nil {
			return 0, err
		}
		if took := time.Since(begin); took > duration/4 {
			return max(n/16, 1, int(float64(n)*float64(duration)/float64(took))), nil
		}
	}
}

// peakMemory is 0 on systems other than Linux.
func peakMemory() float64 {
	status, _ := os.ReadFile("/proc/self/status") // of other systems: nothing
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kilobytes := 0.0
	_, _ = fmt.Sscanf(rest, "%g", &kilobytes)
	return kilobytes / 1024
}

// printOne measures one load, and prints its result.
func printOne(name string, duration time.Duration, profile string) error {
	i := slices.IndexFunc(allLoads(), func(l load) bool { return l.name == name })
	if i < 0 {
		var names []string
		for _, l := range allLoads() {
			names = append(names, l.name)
		}
		return fmt.Errorf("no load is called %q; the loads are %s", name, strings.Join(names, ", "))
	}
	r, err := measure(allLoads()[i], duration, profile)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// inProcess measures a load in its own process.
func inProcess(l load, duration time.Duration) (r result, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	c := exec.Command(self, "-load", l.name, "-time", duration.String())
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		return r, fmt.Errorf("%s: %w", l.name, err)
	}
	return r, json.Unmarshal(out, &r)
}

// measured are the results of a load, by round.
type measured []result

// inTurn measures all loads, round after round, so that a disturbance affects all of them.
func inTurn(loads []load, rounds int, duration time.Duration) (map[string]measured, error) {
	all := make(map[string]measured)
	for round := range rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, rounds)
		for _, l := range loads {
			r, err := inProcess(l, duration)
			if err != nil {
				return nil, err
			}
			all[l.name] = append(all[l.name], r)
		}
	}
	return all, nil
}

func (m measured) median(of func(result) float64) float64 {
	values := make([]float64, len(m))
	for i, r := range m {
		values[i] = of(r)
	}
	return median(values)
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return (values[len(values)/2] + values[(len(values)-1)/2]) / 2
}

func rate(r result) float64   { return r.Rate }
func cpu(r result) float64    { return r.CPU }
func allocs(r result) float64 { return r.Allocs }
func peak(r result) float64   { return r.Peak }

// ratio is the median of the ratios within a round.
func ratio(of, against measured, what func(result) float64) float64 {
	values := make([]float64, len(of))
	for i := range of {
		values[i] = what(of[i]) / what(against[i])
	}
	return median(values)
}
