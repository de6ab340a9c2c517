package plugin

import "time"

const (
	// stallTimeout is how long a full pipeline may make no progress before a stall is logged.
	stallTimeout = 10 * time.Second

	// minSlowTimeout is how long a batch may be in the pipeline without a result before that is
	// logged. Each time that it has a result after all, the time doubles, up to maxSlowTimeout: so
	// a pipeline that is slow by design, such as one whose output batches over minutes, is logged a
	// few times, and one that hangs is still logged.
	minSlowTimeout = time.Minute
	maxSlowTimeout = time.Hour

	// sampleEvery is the number of ticks after which all batches and sessions are looked at: with
	// thousands of them it takes time.
	sampleEvery = 5
)

// stallWatch logs that a pipeline makes no progress. It belongs to the goroutine of watchForStalls.
type stallWatch struct {
	queue  *queue
	paused func() bool // whether reading from any session is paused (backpressure)

	stalled     bool          // whether the current stall has been logged
	slow        bool          // whether the batch that has been in the pipeline for a long time has been logged
	slowTimeout time.Duration // minSlowTimeout to maxSlowTimeout
	slowest     time.Duration // how long that batch was in the pipeline when last seen
}

// watchForStalls checks for stalls periodically, until the input closes, and calls sample every 5 s.
// It runs on its own goroutine, because a timer in ReadBatch would wake up the network poller for
// each single message. paused reports whether reading from any session is paused (backpressure).
func (q *queue) watchForStalls(paused func() bool, sample func()) {
	w := stallWatch{queue: q, paused: paused, slowTimeout: minSlowTimeout}
	ticker := time.NewTicker(stallTimeout / 10)
	defer ticker.Stop()
	for ticks := 1; ; ticks++ {
		select {
		case <-ticker.C:
			w.reportStall()
			if ticks%sampleEvery == 0 {
				w.reportSlow()
				sample()
			}
		case <-q.stopped.Done():
			return
		}
	}
}

// reportStall logs a warning if the pipeline makes no progress while max_in_flight,
// max_buffer_bytes or the limit of a stream's messages is reached: an output hangs, is very slow, or
// has a batching policy that can never fill a batch. Each stall is logged once. It ends only when
// the limits are no longer reached, because even a slow output makes progress from time to time.
func (w *stallWatch) reportStall() {
	q := w.queue
	q.mu.Lock()
	idle := time.Since(q.lastProgress)
	q.mu.Unlock()
	used := q.inFlight.Used()
	stalled := used > 0 && idle >= stallTimeout
	if stalled == w.stalled {
		return
	}
	full := q.inFlight.Full() || q.heldBack.Load() > 0 || w.paused()
	if w.stalled = full; !full || !stalled {
		return
	}
	log := q.log.With("in_flight", used, "idle", stallTimeout, fieldMaxInFlight, q.conf.maxInFlight)
	if q.conf.shared {
		log = log.With("client_quota", clientLimit(q.conf.maxInFlight))
	}
	log.Warn("Pipeline stalled: check whether an output hangs, or waits for a batch that cannot fill (lower its count or byte_size, or set a period)")
}

// reportSlow logs a warning if a batch has been in the pipeline for a long time, whether or not a limit is
// reached, and its end. The time before ReadBatch returned the batch does not count, nor earlier
// deliveries of a message that has failed: a message that fails repeatedly has its own line. A
// stall that is logged already is not logged again.
func (w *stallWatch) reportSlow() {
	first, began, ok := w.queue.longestDelivery()
	age := time.Duration(0)
	if ok {
		age = time.Since(began)
	}
	switch slow := age >= w.slowTimeout; {
	case slow && w.slow:
		w.slowest = age
	case slow && !w.stalled:
		w.slow, w.slowest = true, age
		first.identify(w.queue.log).With("age", age.Round(time.Second), "in_flight", w.queue.inFlight.Used()).
			Warn("A message has been in flight for a long time: check whether an output or a processor hangs, or an output waits for a batch that cannot fill (set batching.period)")
	case !slow && w.slow:
		w.slow = false
		w.slowTimeout = min(2*w.slowTimeout, maxSlowTimeout)
		w.queue.log.With("lasted", w.slowest.Round(time.Second), "in_flight", w.queue.inFlight.Used()).
			Info("Delayed messages are no longer in flight")
	}
}
