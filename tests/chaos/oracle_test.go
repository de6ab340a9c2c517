//go:build linux

package chaos

import (
	"context"
	"fmt"
	"time"

	"github.com/stretchr/testify/assert"
)

// Room for what a process may use more than the least that it has used between faults. A leak of one of anything
// for each fault, connection or message exceeds it within the test's minute or its hour.
const (
	goroutineRoom  = 4
	descriptorRoom = 6         // the clients of Kafka and the file watcher have some for a while
	memoryRoom     = 128 << 20 // beyond what it was: the garbage collector returns memory slowly
	linesPerSecond = 25        // of a log, on average
)

// inFlight returns how many units of a process's route are not at its end.
func (w *world) inFlight(p *process) int {
	if p == w.journal {
		sent, acked, _ := w.journaled.progress()
		return sent - acked
	}
	w.wantNoError(w.collected.read(), "reading the collector's file")
	sent, acked, delivered := w.bridged.progress()
	if p == w.gateway {
		return sent - acked
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.inTopic) - delivered // or more: the test reads the topic later than the bridge
}

// deliveredOn returns how many units of a process's route are delivered.
func (w *world) deliveredOn(p *process) int {
	if p == w.journal {
		w.wantNoError(w.written.read(), "reading the journal")
		_, _, delivered := w.journaled.progress()
		return delivered
	}
	w.wantNoError(w.collected.read(), "reading the collector's file")
	_, _, delivered := w.bridged.progress()
	return delivered
}

// auditRepeatedly audits until the context is done.
func (w *world) auditRepeatedly(ctx context.Context) {
	for {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
		if err := w.audit(ctx); err != nil && ctx.Err() == nil {
			w.wantNoError(err, "audit")
			return
		}
	}
}

// audit checks that everything that is acknowledged by now is where it must be: what the
// applications have sent to the gateway in the topic, and what the bridge has committed in
// the collector's file.
func (w *world) audit(ctx context.Context) error {
	w.auditing.Lock()
	defer w.auditing.Unlock()
	acked, firstUnacked := w.bridged.ackedFrom(w.audited.acked)
	ends := make(map[int32]int)
	for _, p := range w.kafka.PartitionInfos(topic) {
		ends[p.Partition] = int(p.HighWatermark)
	}
	committed := make(map[int32]int)
	if info := w.kafka.GroupInfo(group); info != nil {
		for partition, commit := range info.Commits[topic] {
			committed[partition] = int(commit.Offset)
		}
	}
	if err := w.collected.read(); err != nil {
		return err
	}
	for !w.consumed(ends) {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("reading the topic: %w", ctx.Err())
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range acked {
		if !w.inTopic[id] {
			return fmt.Errorf("unit %d was acknowledged by the gateway and is not in the topic", id)
		}
	}
	w.audited.acked = firstUnacked
	for partition, n := range committed {
		for _, id := range w.records[partition][min(n, w.audited.committed[partition]):n] {
			if id >= 0 && !w.bridged.isDelivered(id) {
				return fmt.Errorf("unit %d of partition %d is committed and is not in the collector's file", id, partition)
			}
		}
		w.audited.committed[partition] = n
	}
	return nil
}

// consumed reports whether the topic was read up to these offsets.
func (w *world) consumed(ends map[int32]int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for partition, end := range ends {
		if len(w.records[partition]) < end {
			return false
		}
	}
	return true
}

// settled returns nil when everything that was sent is acknowledged, delivered and
// committed. Sending must be paused.
func (w *world) settled() error {
	if err := w.collected.read(); err != nil {
		return err
	}
	if err := w.written.read(); err != nil {
		return err
	}
	if !w.apps.idle() {
		return fmt.Errorf("%d applications wait for acknowledgements", w.apps.busy.Load())
	}
	for name, l := range map[string]*ledger{"bridge": w.bridged, "journal": w.journaled} {
		if sent, acked, delivered := l.progress(); acked < sent || delivered < sent {
			return fmt.Errorf("route of the %s: %d sent, %d acknowledged, %d delivered; missing: %d", name, sent, acked, delivered, l.missing())
		}
	}
	info := w.kafka.GroupInfo(group)
	for _, p := range w.kafka.PartitionInfos(topic) {
		if info == nil || info.Commits[topic][p.Partition].Offset < p.HighWatermark {
			return fmt.Errorf("partition %d is not committed up to %d", p.Partition, p.HighWatermark)
		}
	}
	return nil
}

// state describes where the units of both routes are.
func (w *world) state() string {
	bridgedSent, bridgedAcked, bridgedDelivered := w.bridged.progress()
	journalSent, journalAcked, journalDelivered := w.journaled.progress()
	w.mu.Lock()
	inTopic := len(w.inTopic)
	w.mu.Unlock()
	records, committed := int64(0), int64(0)
	info := w.kafka.GroupInfo(group)
	for _, p := range w.kafka.PartitionInfos(topic) {
		records += p.HighWatermark
		if info != nil {
			committed += info.Commits[topic][p.Partition].Offset
		}
	}
	state := "no group"
	if info != nil {
		state = fmt.Sprintf("group %s with %d members", info.State, len(info.Members))
	}
	return fmt.Sprintf("gateway: %d sent, %d acknowledged; topic: %d units in %d records, %d committed, %s; collector: %d delivered; journal: %d sent, %d acknowledged, %d delivered",
		bridgedSent, bridgedAcked, inTopic, records, committed, state, bridgedDelivered, journalSent, journalAcked, journalDelivered)
}

// gauges are the values that each process must export when everything is settled.
func (w *world) gauges(p *process) map[string]float64 {
	sessions := map[*process]map[string]float64{
		w.gateway: {"input": bridged}, w.bridge: {"output": 1}, w.relay: {"input": 1, "output": 1},
		w.collector: {"input": 1}, w.journal: {"input": journaled},
	}[p]
	gauges := make(map[string]float64)
	for half, n := range sessions {
		label := map[string]string{"input": "in", "output": "out"}[half]
		series := fmt.Sprintf(`{label=%q,path="root.%s"}`, label, half)
		gauges["cryo_sessions"+series] = n
		gauges["cryo_messages_unacknowledged"+series] = 0
		gauges["cryo_streams_open"+series] = 0
	}
	return gauges
}

// usage is what a process uses.
type usage struct{ goroutines, descriptors, memory float64 }

// usage returns what each process uses.
func (w *world) usage() map[*process]usage {
	used := make(map[*process]usage)
	for _, p := range w.processes() {
		exported, err := p.metrics()
		w.wantNoError(err, "metrics of %s", p.name)
		used[p] = usage{exported["go_goroutines"], exported["process_open_fds"], exported["process_resident_memory_bytes"]}
		assert.Positive(w.t, used[p].goroutines)
		assert.Positive(w.t, used[p].descriptors)
		assert.Positive(w.t, used[p].memory)
	}
	return used
}

// wantNoLeak wants the usage to be back where it was, in time. Just after its start a process
// uses more descriptors, so the least that it has used is what counts.
func (w *world) wantNoLeak(r *report) {
	w.await("goroutines, descriptors and memory to be as before", recovery, func() error {
		r.after = w.usage()
		for _, p := range w.processes() {
			before, after := r.before[p], r.after[p]
			for what, values := range map[string][3]float64{
				"goroutines":      {before.goroutines, after.goroutines, goroutineRoom},
				"descriptors":     {before.descriptors, after.descriptors, descriptorRoom},
				"bytes of memory": {before.memory, after.memory, memoryRoom},
			} {
				if values[1] > values[0]+values[2] {
					return fmt.Errorf("%s has %.0f %s, and had %.0f", p.name, values[1], what, values[0])
				}
			}
			r.before[p] = usage{min(before.goroutines, after.goroutines), min(before.descriptors, after.descriptors), min(before.memory, after.memory)}
		}
		return nil
	})
}

// wantQuietLogs wants the logs to be bounded. (That they contain no token is checked as
// they are written.)
func (w *world) wantQuietLogs() {
	for _, p := range w.processes() {
		assert.LessOrEqual(w.t, p.linesPerSecond(), float64(linesPerSecond), "lines per second of %s", p.name)
	}
}

func (p *process) linesPerSecond() float64 {
	return float64(p.lines.Load()) / time.Since(p.began).Seconds()
}

// wantEveryKind wants each kind of fault to have happened, with units in flight.
func (w *world) wantEveryKind(r *report) {
	for _, kind := range faultKinds {
		k := r.kinds[kind.kind]
		if assert.NotNil(w.t, k, "no fault of the kind %q", kind.kind) {
			assert.GreaterOrEqual(w.t, k.inFlight, k.times, "%s: there were units in flight", kind.kind)
		}
	}
}
