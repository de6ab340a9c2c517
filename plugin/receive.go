package plugin

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// receiver is the receiving half of an input. It delivers the messages of its sessions to the
// pipeline in batches, and acknowledges, rejects or redelivers them according to the pipeline's
// results.
type receiver struct {
	conf      receiveConfig
	log       *service.Logger
	metrics   receiveMetrics
	queue     *queue
	feeder    *feeder
	responder *responder

	rejectLog, responseLog, redeliveryLog limitedLog

	// Accessed only by ReadBatch.
	last       *delivery // most recently returned by ReadBatch; the engine may still discard it
	stopHooked bool      // whether drain is registered to run when the engine stops

	stop     context.CancelFunc // ends all feeds
	drain    context.CancelFunc // stops accepting streams, because the engine reads no more batches
	feeds    sync.WaitGroup
	watchdog sync.Once // starts watchForStalls

	mu       sync.Mutex
	sessions map[*cryo.Session]*sessionFeed
	byID     map[string]*sessionFeed // most recent feed with session events, by session id
}

func newReceiver(conf receiveConfig, res *service.Resources) *receiver {
	r := &receiver{
		conf:     conf,
		log:      res.Logger(),
		metrics:  newReceiveMetrics(meterOf(res)),
		sessions: make(map[*cryo.Session]*sessionFeed),
		byID:     make(map[string]*sessionFeed),
	}
	stopped, stop := context.WithCancel(context.Background())
	draining, drain := context.WithCancel(stopped)
	r.stop, r.drain = stop, drain
	r.queue = newQueue(stopped, &r.conf, r.log, r.metrics.unacknowledged)
	r.feeder = &feeder{
		conf: &r.conf, queue: r.queue, metrics: &r.metrics, log: r.log,
		errorLog: newLimitedLog(r.log), streamLog: newLimitedLog(r.log), pullLog: newLimitedLog(r.log),
		stopped: stopped, draining: draining,
	}
	r.responder = newResponder(conf.ackTimeout, res)
	r.rejectLog, r.responseLog, r.redeliveryLog = newLimitedLog(r.log), newLimitedLog(r.log), newLimitedLog(r.log)
	return r
}

// read implements ReadBatch for both inputs. It returns ErrNotConnected once lost is closed and
// no messages are left. If the sessions share a listener, it does so even while messages are
// left: lost then means that no client can connect, and the connected ones may continue sending
// forever.
func (r *receiver) read(ctx context.Context, lost <-chan struct{}) (service.MessageBatch, service.AckFunc, error) {
	if r.last != nil {
		r.acknowledgeReceipt(r.last) // the engine reads the next batch, so it has accepted the last one
		r.last = nil
	}
	if !r.stopHooked { // register at the first call, because there may be no other
		r.stopHooked = true
		context.AfterFunc(ctx, r.drain)
	}
	if r.conf.shared {
		select {
		case <-lost:
			return nil, nil, service.ErrNotConnected
		default:
		}
	}
	items, err := r.queue.next(ctx, lost)
	if err != nil {
		return nil, nil, err
	}
	d, batch := newDelivery(items, r.conf.includeMetadata)
	r.queue.addDelivery(d)
	r.last = d
	return batch, func(ctx context.Context, err error) error {
		r.verdict(ctx, d, err)
		return nil
	}, nil
}

// verdict applies err, the pipeline's result for a delivery. If it is nil, every message of the
// batch was delivered. An error for a batch of one message applies to that message. An error
// for a larger batch does not reliably identify the messages that failed
// (docs/development/engine-faults.md), so each message is redelivered alone and has its own result.
// Only the first result of a delivery counts, and an error during a hard stop is ignored. During a
// graceful stop nothing is rejected: the stop may have caused the error, as CancelSends does.
func (r *receiver) verdict(ctx context.Context, d *delivery, err error) {
	if err != nil && ctx.Err() != nil || !r.queue.firstResult(d) {
		return
	}
	r.acknowledgeReceipt(d)
	var delivered []item
	var responses []*syncResponse
	if err == nil {
		if delivered, responses, err = d.match(); err != nil {
			if log, ok := r.responseLog.allow(); ok {
				log.With("messages", len(d.items), "error", err).Warn("Redelivering the messages of a batch one by one")
			}
		}
	}
	switch {
	case err == nil:
		r.delivered(ctx, d, delivered, responses)
	case len(d.items) > 1:
		r.log.With("messages", len(d.items), "error", err).Debug("Redelivering the messages of a batch one by one")
		r.metrics.redelivered.Incr(int64(len(d.items)))
		r.queue.redeliverAlone(d)
	case r.conf.replay || r.feeder.draining.Err() != nil:
		r.logFailure(&d.items[0], err)
		r.metrics.redelivered.Incr(1)
		r.queue.redeliverLater(d)
	default:
		r.reject(d.items, err)
		r.queue.release(d.items)
		r.queue.removeDelivery(d)
	}
}

// delivered acknowledges the messages of a batch that was delivered. items are those without a
// response, which are acknowledged immediately. The others are acknowledged once their
// responses have been. Until then the whole batch stays in the queue's deliveries, so that a
// hard stop loses no message; at worst, some messages are delivered twice.
func (r *receiver) delivered(ctx context.Context, d *delivery, items []item, responses []*syncResponse) {
	endFirstPass(d.items)
	r.acknowledge(items)
	r.queue.delivered(items)
	if len(responses) > 0 {
		r.responder.send(ctx, responses, func(responses []*syncResponse, errs []error) {
			r.responded(ctx, d, responses, errs)
		})
	}
	r.queue.removeDelivery(d)
}

// responded acknowledges or rejects messages according to the results of their responses. A
// message whose response fails is rejected even with auto_replay_nacks: the pipeline has
// delivered it, and delivering it again would not make the peer accept the response.
func (r *receiver) responded(ctx context.Context, d *delivery, responses []*syncResponse, errs []error) {
	var acknowledged []item
	for i, resp := range responses {
		switch err := errs[i]; {
		case err == nil:
			acknowledged = append(acknowledged, resp.items...)
		case ctx.Err() != nil: // a hard stop: the result is unknown
			r.queue.retain(d, resp.items)
			continue
		case errors.Is(err, net.ErrClosed):
			r.log.With("session", resp.source.id, "error", err).Debug("Session ended before it acknowledged a response")
			for _, it := range resp.items {
				it.reject() // releases the item's part of the receive buffer
			}
		default:
			if log, ok := r.responseLog.allow(); ok {
				log.With("session", resp.source.id, "error", err).Warn("Rejected a message: its response was not acknowledged")
			}
			r.rejectAll(resp.items)
		}
	}
	r.acknowledge(acknowledged)
	for i, resp := range responses {
		if errs[i] == nil || ctx.Err() == nil {
			r.queue.release(resp.items)
		}
	}
}

// acknowledgeReceipt acknowledges the messages of a batch if acknowledge is set to received,
// and if that has not been done yet. It is called when the engine reads the next batch or
// returns a result, because until then the engine may still discard the batch when it stops.
func (r *receiver) acknowledgeReceipt(d *delivery) {
	if r.conf.onReceipt {
		r.acknowledgeNow(r.queue.markReceived(d))
	}
}

// acknowledge acknowledges delivered items, unless they were acknowledged on receipt.
func (r *receiver) acknowledge(items []item) {
	if !r.conf.onReceipt {
		r.acknowledgeNow(items)
	}
}

func (r *receiver) acknowledgeNow(items []item) {
	if err := acknowledge(items, &r.metrics); err != nil {
		r.log.With("error", err).Debug("Cannot acknowledge delivered messages: their senders may send them again")
	}
}

// reject logs that items were not delivered, and rejects them.
func (r *receiver) reject(items []item, cause error) {
	endFirstPass(items)
	if log, ok := r.rejectLog.allow(); ok {
		if r.conf.onReceipt {
			log.With("messages", len(items), "error", cause).Error("Lost messages that were acknowledged on receipt")
		} else {
			log.With("messages", len(items), "error", cause).Error("Rejected messages that were not delivered")
		}
	}
	r.rejectAll(items)
}

func (r *receiver) rejectAll(items []item) {
	if r.conf.onReceipt {
		return // they have already been acknowledged
	}
	for i := range items {
		if m := items[i].message; m != nil {
			r.metrics.rejected.Incr(1, messageTypeName(m.Kind))
		}
		items[i].reject()
	}
}

// logFailure logs that a failed message is redelivered, and warns if it has failed repeatedly.
func (r *receiver) logFailure(it *item, err error) {
	r.log.With("error", err).Debug("Redelivering a message")
	if it.failures < outageFailures {
		return
	}
	if log, ok := r.redeliveryLog.allow(); ok {
		it.identify(log).With("failures", it.failures+1, "error", err).Warn("A message has failed repeatedly: redelivering it until it is delivered")
	}
}

// receiveFrom starts to receive from a session, beginning with what another input has handed
// over, if anything. The returned channel is closed when the session has ended and all its
// messages have been passed to the pipeline.
func (r *receiver) receiveFrom(h *handover) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.sessions[h.session]; known != nil {
		return known.ended
	}
	f := r.feeder.newFeed(h)
	r.sessions[h.session] = f
	if last := r.byID[f.id]; r.conf.sessions && !(last != nil && f.session.Err() != nil && last.session.Err() == nil) {
		f.emitsEvents, r.byID[f.id] = true, f
		if last != nil {
			f.previous = last.ended
		}
	}
	r.watchdog.Do(func() { r.feeds.Go(func() { r.queue.watchForStalls(r.paused, r.sample) }) })
	r.feeds.Go(func() {
		if f.run() {
			r.remove(f)
		}
	})
	return f.ended
}

// remove removes the feed of a session that has ended.
func (r *receiver) remove(f *sessionFeed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sessions, f.session)
	if r.byID[f.id] == f {
		delete(r.byID, f.id)
	}
	close(f.ended)
}

// has reports whether the input receives from a session.
func (r *receiver) has(s *cryo.Session) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sessions[s] != nil
}

// sessionCount returns the number of sessions of the input, including sessions that have ended
// but whose messages have not all been passed to the pipeline.
func (r *receiver) sessionCount() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions)
}

// endedOf returns the number of sessions of a client that have ended but whose messages have not
// all been passed to the pipeline. It may return 0 if there are fewer than enough: then it does not
// look at each session.
func (r *receiver) endedOf(client string, enough int) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.queue.feedsOf(client) < enough {
		return 0
	}
	for s, f := range r.sessions {
		if f.client() == client && s.Err() != nil {
			n++
		}
	}
	return n
}

// hasEventsOf reports whether the input has a session with this id that emits events, which
// must precede those of the next session with the same id.
func (r *receiver) hasEventsOf(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byID[id] != nil
}

// paused reports whether reading from any session is paused because its messages are not
// acknowledged (backpressure).
func (r *receiver) paused() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.sessions {
		if isPaused(s) {
			return true
		}
	}
	return false
}

func isPaused(s *cryo.Session) bool {
	stats := s.Stats()
	return stats.Paused && !stats.Throttled
}

// sample sets the gauges that nothing else updates.
func (r *receiver) sample() {
	age := time.Duration(0)
	if oldest := r.queue.oldest(); !oldest.IsZero() {
		age = time.Since(oldest)
	}
	r.metrics.oldest.set(int64(age))
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for s := range r.sessions {
		if isPaused(s) {
			n++
		}
	}
	r.metrics.paused.set(n)
}
