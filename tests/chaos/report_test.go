//go:build linux

package chaos

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// clock is the format of times in the log of the test.
const clock = "15:04:05.000"

// report records what has happened.
type report struct {
	w             *world
	began         time.Time
	before, after map[*process]usage

	mu         sync.Mutex
	kinds      map[string]*kindReport
	rounds     int
	recoveries []time.Duration
	events     []string // the faults, with the time at which each began
}

// kindReport is about the faults of a kind.
type kindReport struct {
	times    int
	inFlight int           // units in flight when they began, of all together
	longest  time.Duration // from the fault's begin to the first delivery after its end
}

func newReport(w *world) *report {
	r := &report{w: w, began: time.Now(), kinds: make(map[string]*kindReport)}
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("the last faults:\n%s", strings.Join(r.events[max(0, len(r.events)-40):], "\n"))
		}
	})
	return r
}

// begin records the begin of a fault.
func (r *report) begin(f fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, fmt.Sprintf("%s  %s: %s", time.Now().UTC().Format(clock), f.kind, f.place))
}

// injected records a fault, and how many units were in flight when it began.
func (r *report) injected(f fault, inFlight int, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[f.kind]
	if k == nil {
		k = &kindReport{}
		r.kinds[f.kind] = k
	}
	k.times++
	k.inFlight += inFlight
	k.longest = max(k.longest, took)
}

// recovered records the end of a round.
func (r *report) recovered(took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rounds++
	r.recoveries = append(r.recoveries, took)
}

// logProgress logs what has happened up to now.
func (r *report) logProgress() {
	r.mu.Lock()
	defer r.mu.Unlock()
	bridged, journaled := r.w.bridged.counts(), r.w.journaled.counts()
	r.w.t.Logf("%v: round %d, recovered in %v; delivered %d units by the bridge, %d by the journal", time.Since(r.began).Round(time.Second),
		r.rounds, r.recoveries[len(r.recoveries)-1].Round(time.Millisecond), bridged.delivered, journaled.delivered)
}

// log logs the closing table.
func (r *report) log() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out strings.Builder
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	faults := 0
	fmt.Fprintln(table, "fault\ttimes\tin flight at its begin\tlongest time from begin to next delivery")
	for _, kind := range faultKinds {
		if k := r.kinds[kind.kind]; k != nil {
			faults += k.times
			fmt.Fprintf(table, "%s\t%d\t%d\t%v\n", kind.kind, k.times, k.inFlight/k.times, k.longest.Round(time.Millisecond))
		}
	}
	fmt.Fprintln(table, "\nroute\tmessages\tstreams\tacknowledged\tdelivered\tmore than once\ttorn lines")
	for _, s := range []*sink{r.w.collected, r.w.written} {
		c := s.ledger.counts()
		name := map[*sink]string{r.w.collected: "gateway to collector", r.w.written: "journal"}[s]
		fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%d\t%d\t%d\n", name, c.messages, c.streams, c.acked, c.delivered, c.again, s.torn)
	}
	fmt.Fprintln(table, "\nprocess\trestarts\tlog lines per second\tgoroutines\tdescriptors\tmemory in MiB")
	for _, p := range r.w.processes() {
		before, after := r.before[p], r.after[p]
		fmt.Fprintf(table, "%s\t%d\t%.1f\t%.0f → %.0f\t%.0f → %.0f\t%.0f → %.0f\n", p.name, p.restarts.Load(), p.linesPerSecond(),
			before.goroutines, after.goroutines, before.descriptors, after.descriptors, before.memory/(1<<20), after.memory/(1<<20))
	}
	_ = table.Flush()
	r.w.t.Logf("%d faults in %d rounds, %v; %d sends failed and were repeated, %d of them were rejected; longest recovery %v\n\n%s",
		faults, r.rounds, time.Since(r.began).Round(time.Second), r.w.apps.failed.Load(), r.w.apps.rejected.Load(),
		slices.Max(append(r.recoveries, 0)).Round(time.Millisecond), out.String())
}
