//go:build linux

// Package chaos lets faults of the network, of the processes and of what they need come at
// random, on pipelines with all four components in the binary, and holds the promise
// against them: nothing that was acknowledged is missing, and everything is delivered once
// all is well.
package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

const (
	// recovery is the time after the last fault in which everything must be delivered. It
	// contains the longest waits of components: 30 s between two attempts to deliver a message
	// that fails, or to connect with a token that was rejected.
	recovery = 90 * time.Second
	// injectors is how many faults there are at a time.
	injectors = 2
)

// duration is how long faults come: in a long test for an hour, or for as long as -timeout
// of "go test" allows.
func duration(t *testing.T) time.Duration {
	if !testkit.LongTests() {
		return 25 * time.Second
	}
	if deadline, ok := t.Deadline(); ok {
		return min(time.Hour, time.Until(deadline)-2*recovery)
	}
	return time.Hour
}

// Faults come in rounds. A round has a fault of each kind, in random order, and ends when
// everything that was sent is delivered, and the processes use no more than before.
func TestNothingIsLostInChaos(t *testing.T) {
	random := testkit.Random(t)
	w := newWorld(t)
	w.runApps(random)
	report := newReport(w)
	w.calmTraffic()
	w.recover()
	report.before = w.usage()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var auditing sync.WaitGroup
	auditing.Go(func() { w.auditRepeatedly(ctx) })
	defer func() { cancel(); auditing.Wait() }()

	end := time.Now().Add(duration(t))
	for first := true; (first || time.Now().Before(end)) && !t.Failed(); first = false {
		w.apps.pause(false)
		w.round(random, report)
		report.recovered(w.recover())
		w.wantNoLeak(report)
		report.logProgress()
	}
	defer report.log()
	if t.Failed() {
		return
	}
	w.reconnect(2 + max(goroutineRoom, descriptorRoom))
	w.recover()
	w.wantNoLeak(report)
	w.wantQuietLogs()
	w.wantEveryKind(report)
}

// calmTraffic lets each route deliver units without faults.
func (w *world) calmTraffic() { w.traffic(100) }

// traffic waits until each route has delivered n more units.
func (w *world) traffic(n int) {
	first, second := w.deliveredOn(w.collector), w.deliveredOn(w.journal)
	w.await("deliveries on both routes", recovery, func() error {
		if delivered := min(w.deliveredOn(w.collector)-first, w.deliveredOn(w.journal)-second); delivered < n {
			return fmt.Errorf("%d of %d", delivered, n)
		}
		return nil
	})
}

// reconnect cuts all lines n times. After it, a leak of one of anything for each connection
// exceeds the room, whenever the processes were started.
func (w *world) reconnect(n int) {
	w.apps.pause(false)
	for range n {
		for _, l := range w.allLines() {
			l.cut()
		}
		w.traffic(1)
		time.Sleep(1100 * time.Millisecond) // after shorter sessions, clients wait longer and longer
	}
}

// round injects a fault of each kind.
func (w *world) round(random *rand.Rand, report *report) {
	faults := make(chan fault, len(faultKinds))
	for _, kind := range random.Perm(len(faultKinds)) {
		faults <- newFault(w, kind, random)
	}
	close(faults)
	var injecting sync.WaitGroup
	for range injectors {
		injecting.Go(func() {
			for f := range faults {
				if w.t.Failed() {
					return
				}
				w.inject(f, report)
			}
		})
	}
	injecting.Wait()
}

// inject injects a fault when units are in flight, and waits until one is delivered, so that
// there is traffic between two faults.
func (w *world) inject(f fault, report *report) {
	inFlight := 0
	w.await("units in flight at "+f.place, recovery, func() error {
		if inFlight = w.inFlight(f.route); inFlight <= 0 {
			return errors.New("none")
		}
		return nil
	})
	begin, before := time.Now(), w.deliveredOn(f.route)
	report.begin(f)
	w.wantNoError(f.inject(), "%s: %s", f.kind, f.place)
	w.await("a delivery since the begin of "+f.kind+": "+f.place, recovery, func() error {
		if w.deliveredOn(f.route) == before {
			return errors.New("none")
		}
		return nil
	})
	report.injected(f, inFlight, time.Since(begin))
}

// recover waits until everything that was sent is delivered, and everything is quiet again.
// It returns how long the deliveries took.
func (w *world) recover() time.Duration {
	begin := time.Now()
	w.apps.pause(true)
	w.await("the delivery of everything that was sent", recovery, w.settled)
	took := time.Since(begin)
	ctx, cancel := context.WithTimeout(context.Background(), recovery)
	defer cancel()
	w.wantNoError(w.audit(ctx), "audit")

	// Without messages, an application and an output do not connect again.
	w.apps.connect(ctx)
	w.apps.pause(false)
	w.calmTraffic()
	w.apps.pause(true)
	w.await("the delivery of what was sent without faults", recovery, w.settled)
	for _, p := range w.processes() {
		w.await("the gauges of "+p.name, recovery, func() error {
			exported, err := p.metrics()
			for series, want := range w.gauges(p) {
				if got, ok := exported[series]; err == nil && (!ok || got != want) {
					err = fmt.Errorf("%s is %v in place of %v", series, got, want)
				}
			}
			if err != nil {
				return err
			}
			return p.ready()
		})
	}
	return took
}

// await repeats f until it returns nil, or the test has failed. Its last error is a failure.
func (w *world) await(what string, longest time.Duration, f func() error) {
	var err error
	begin, logged := time.Now(), false
	for time.Since(begin) < longest {
		if err = f(); err == nil || w.t.Failed() {
			return
		}
		if !logged && time.Since(begin) > longest/6 {
			logged = true
			w.t.Logf("%s: still waiting for %s: %s", time.Now().UTC().Format(clock), what, w.state())
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.wantNoError(err, "timed out waiting for %s", what)
}

// wantNoError fails the test if there is an error, on any goroutine.
func (w *world) wantNoError(err error, format string, values ...any) {
	w.t.Helper()
	assert.NoErrorf(w.t, err, format, values...)
}
