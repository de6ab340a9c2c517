package plugin

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// receiver is the receiving half of an input: it delivers the messages of its sessions to the
// pipeline in batches, and acknowledges, rejects or redelivers them by the pipeline's results.
type receiver struct {
	conf      receiveConfig
	log       *service.Logger
	metrics   receiveMetrics
	queue     *queue
	feeder    *feeder
	responder *responder

	rejectLog, responseLog, redeliveryLog limitedLog

	// Owned by ReadBatch.
	last       *delivery // returned last; the engine may still discard it
	stopHooked bool      // a stop of the engine calls drain

	stop     context.CancelFunc // ends all feeds
	drain    context.CancelFunc // stops accepting streams: the engine reads no more batches
	feeds    sync.WaitGroup
	watchdog sync.Once // starts the detection of stalls

	mu       sync.Mutex
	sessions map[*cryo.Session]*sessionFeed
	byID     map[string]*sessionFeed // last feed of each session id that emits events
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

// read implements ReadBatch of the inputs. When lost is closed and no messages are left, it
// returns ErrNotConnected. When the sessions share a listener, lost means that no client can
// connect, and it does so although messages are left: they may never end.
func (r *receiver) read(ctx context.Context, lost <-chan struct{}) (service.MessageBatch, service.AckFunc, error) {
	if r.last != nil {
		r.acknowledgeReceipt(r.last) // the engine reads the next batch, so it has accepted this one
		r.last = nil
	}
	if !r.stopHooked { // at the first call: the engine may not call again
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

// verdict applies the pipeline's result for a delivery. Without an error, every message
// of the batch is delivered. An error for a batch of one applies to that message. An error
// for a batch of several does not identify the failed messages, whichever it names
// (docs/engine-faults.md): each is redelivered alone, and gets a result of its own. Only the
// first result of a delivery counts. An error during a hard stop is not a result.
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
				log.With("messages", len(d.items), "error", err).Warn("Redelivering a batch message by message")
			}
		}
	}
	switch {
	case err == nil:
		r.delivered(ctx, d, delivered, responses)
	case len(d.items) > 1:
		r.log.With("messages", len(d.items), "error", err).Debug("Redelivering a batch message by message")
		r.queue.redeliverAlone(d)
	case r.conf.replay:
		r.logFailure(&d.items[0], err)
		r.queue.redeliverLater(d)
	default:
		r.reject(d.items, err)
		r.queue.release(d.items)
		r.queue.removeDelivery(d)
	}
}

// delivered acknowledges the messages of a batch. A message with a response is acknowledged
// when the response is. Until then the whole batch stays in the queue's deliveries, so that
// a hard stop loses no message; at worst, one is delivered twice.
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

// responded acknowledges or rejects messages by the results of their responses. A message
// whose response fails is rejected even with auto_replay_nacks: the pipeline has delivered
// it, and delivering it again would not make the peer accept the response.
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

// acknowledgeReceipt acknowledges a batch once with acknowledge: received. It is called when
// the engine reads the next batch or returns a result: a batch that ReadBatch has just
// returned may still be discarded by the engine when it stops.
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

// reject logs and rejects items that were not delivered.
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
		return // they are acknowledged already
	}
	for i := range items {
		if m := items[i].message; m != nil {
			r.metrics.rejected.Incr(1, messageTypeName(m.Kind))
		}
		items[i].reject()
	}
}

// logFailure logs that a message is redelivered.
func (r *receiver) logFailure(it *item, err error) {
	r.log.With("error", err).Debug("Redelivering a message")
	if it.failures < outageFailures {
		return
	}
	if log, ok := r.redeliveryLog.allow(); ok {
		log.With("session", it.source.id, "failures", it.failures+1, "error", err).Warn("A message fails repeatedly: redelivering it until it is delivered")
	}
}

// receiveFrom starts to receive from a session, beginning with the messages that another
// input has handed over. The returned channel is closed when the session has ended and all
// its messages are delivered to the pipeline.
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
	r.watchdog.Do(func() { r.feeds.Go(func() { r.queue.watchForStalls(r.paused) }) })
	r.feeds.Go(func() {
		if f.run() {
			r.remove(f)
		}
	})
	return f.ended
}

// remove removes a feed whose session has ended.
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

// sessionCount returns the number of sessions of the input, including those that have ended
// with messages that are not yet delivered to the pipeline.
func (r *receiver) sessionCount() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions)
}

// hasEventsOf reports whether the input has a session with this id whose events must precede
// those of the next session with the id.
func (r *receiver) hasEventsOf(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byID[id] != nil
}

// paused reports whether the reads of any session are paused (backpressure).
func (r *receiver) paused() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.sessions {
		if s.Stats().Paused {
			return true
		}
	}
	return false
}
