package plugin

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// receiver is the receiving half of an input: it hands what its sessions receive to the
// pipeline, in batches, and settles it by the pipeline's verdicts.
type receiver struct {
	conf      receiveConfig
	log       *service.Logger
	metrics   receiveMetrics
	queue     *queue
	feeder    *feeder
	responder *responder

	rejectLog, responseLog, redeliveryLog limitedLog

	// Owned by ReadBatch.
	last     *delivery // handed over; the engine may still throw it away
	watching bool      // the engine's stop calls drain

	stop  context.CancelFunc // of all feeds; nothing more is handed over
	drain context.CancelFunc // the engine reads no more
	feeds sync.WaitGroup
	watch sync.Once // starts the stall watchdog

	mu       sync.Mutex
	sessions map[*cryo.Session]*sessionFeed
	byID     map[string]*sessionFeed // the last feed of each session id; with session events only
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
		openStreams: newStreamQuota(conf.streams.maxOpen, conf.shared),
		errorLog:    newLimitedLog(r.log), streamLog: newLimitedLog(r.log), pullLog: newLimitedLog(r.log),
		stopped: stopped, draining: draining,
	}
	r.responder = newResponder(conf.ackTimeout, res)
	r.rejectLog, r.responseLog, r.redeliveryLog = newLimitedLog(r.log), newLimitedLog(r.log), newLimitedLog(r.log)
	return r
}

// read is ReadBatch of the inputs. lost is closed when the only session has ended and all
// its messages are handed over; it is nil if there is no such session.
func (r *receiver) read(ctx context.Context, lost <-chan struct{}) (service.MessageBatch, service.AckFunc, error) {
	if r.last != nil {
		r.acknowledgeReceipt(r.last) // the engine asks for the next one, so it has this one
		r.last = nil
	}
	if !r.watching { // here, because the engine may never ask again
		r.watching = true
		context.AfterFunc(ctx, r.drain)
	}
	items, err := r.queue.next(ctx, lost)
	if err != nil {
		return nil, nil, err
	}
	d, batch := newDelivery(items, r.conf.includeMetadata)
	r.queue.handedOver(d)
	r.last = d
	return batch, func(ctx context.Context, err error) error {
		r.verdict(ctx, d, err)
		return nil
	}, nil
}

// verdict acts on the pipeline's verdict. No error means that every message of the batch
// is delivered. An error for a batch of one is that message's. An error for a batch of
// several says nothing about any one of them, whatever messages it names
// (docs/engine-faults.md): each is delivered again, alone, and then its own verdict counts.
// Only the first verdict on a delivery does. A hard stop gives none.
func (r *receiver) verdict(ctx context.Context, d *delivery, err error) {
	if err != nil && ctx.Err() != nil || !r.queue.decide(d) {
		return
	}
	r.acknowledgeReceipt(d)
	var delivered []item
	var responses []*syncResponse
	if err == nil {
		if delivered, responses, err = d.match(); err != nil {
			if log, ok := r.responseLog.allow(); ok {
				log.Warnf("Delivering the %d messages of a batch again: %v", len(d.items), err)
			}
		}
	}
	switch {
	case err == nil:
		r.delivered(ctx, d, delivered, responses)
	case len(d.items) > 1:
		r.log.Debugf("Delivering %d messages again, each alone: %v", len(d.items), err)
		r.queue.redeliverAlone(d)
	case r.conf.replay:
		r.logFailure(&d.items[0], err)
		r.queue.redeliverLater(d)
	default:
		r.reject(d.items, err)
		r.queue.release(d.items)
		r.queue.settled(d)
	}
}

// delivered acknowledges a batch: each message once its response, if it has one, is
// acknowledged. Until then close counts the whole batch as unsettled, so that a hard stop
// in the middle loses no message; at worst one is delivered twice.
func (r *receiver) delivered(ctx context.Context, d *delivery, items []item, responses []*syncResponse) {
	passed(d.items)
	r.acknowledge(items)
	r.queue.delivered(items)
	if len(responses) > 0 {
		r.responder.send(ctx, responses, func(responses []*syncResponse, errs []error) {
			r.responded(ctx, d, responses, errs)
		})
	}
	r.queue.settled(d)
}

// responded settles messages by the acknowledgements of their responses. A message whose
// syncResponse is not acknowledged is rejected even with auto_replay_nacks: the pipeline has
// done its part, and doing it again would not make the other end accept the response.
func (r *receiver) responded(ctx context.Context, d *delivery, responses []*syncResponse, errs []error) {
	var acknowledged []item
	for i, resp := range responses {
		switch err := errs[i]; {
		case err == nil:
			acknowledged = append(acknowledged, resp.items...)
		case ctx.Err() != nil: // a hard stop: nothing is known
			r.queue.leave(d, resp.items)
			continue
		case errors.Is(err, net.ErrClosed):
			r.log.With("session", resp.source.id).Debugf("The session has ended before it acknowledged a response: %v", err)
			for _, it := range resp.items {
				it.reject() // nobody receives it, but it releases what the item has reserved
			}
		default:
			if log, ok := r.responseLog.allow(); ok {
				log.With("session", resp.source.id).Warnf("Rejected a message, because its sender has not acknowledged the response: %v", err)
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

// acknowledgeReceipt acknowledges a batch, once, as soon as the pipeline has it, with
// acknowledge: received. A batch that ReadBatch has returned may still be thrown away by
// the engine when it stops; so the proof is that the engine asks for the next one, or has a
// verdict.
func (r *receiver) acknowledgeReceipt(d *delivery) {
	if r.conf.onReceipt {
		r.acknowledgeNow(r.queue.received(d))
	}
}

// acknowledge acknowledges what is delivered, if that was not done on receipt.
func (r *receiver) acknowledge(items []item) {
	if !r.conf.onReceipt {
		r.acknowledgeNow(items)
	}
}

func (r *receiver) acknowledgeNow(items []item) {
	if err := acknowledge(items, &r.metrics); err != nil {
		r.log.Debugf("Delivered, but not acknowledged; the sender may send it again: %v", err)
	}
}

// reject rejects a message that was not delivered.
func (r *receiver) reject(items []item, cause error) {
	passed(items)
	if log, ok := r.rejectLog.allow(); ok {
		if r.conf.onReceipt {
			log.Errorf("Lost %d messages that were acknowledged when they were received: %v", len(items), cause)
		} else {
			log.Errorf("Rejected %d messages: %v", len(items), cause)
		}
	}
	r.rejectAll(items)
}

func (r *receiver) rejectAll(items []item) {
	if r.conf.onReceipt {
		return // they were acknowledged
	}
	for i := range items {
		if m := items[i].message; m != nil {
			r.metrics.rejected.Incr(1, messageTypeName(m.Kind))
		}
		items[i].reject()
	}
}

// logFailure logs that a message is delivered again.
func (r *receiver) logFailure(it *item, err error) {
	r.log.Debugf("Delivering a message again: %v", err)
	if it.failures < outageFailures {
		return
	}
	if log, ok := r.redeliveryLog.allow(); ok {
		log.With("session", it.source.id, "failures", it.failures+1).Warnf("A message is delivered again until it succeeds: %v", err)
	}
}

// receiveFrom starts to receive from a session, after what another input has left of it.
// The returned channel is closed when the session has ended and all that it received is
// handed over.
func (r *receiver) receiveFrom(h *handover) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.sessions[h.session]; known != nil {
		return known.ended
	}
	f := r.feeder.newFeed(h)
	r.sessions[h.session] = f
	if last := r.byID[f.id]; r.conf.sessions && !(last != nil && f.session.Err() != nil && last.session.Err() == nil) {
		f.emits, r.byID[f.id] = true, f
		if last != nil {
			f.previous = last.ended
		}
	}
	r.watch.Do(func() { r.feeds.Go(func() { r.queue.watchForStalls(r.paused) }) })
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

// keeps returns the number of sessions of the input, with those that have ended but of
// which not all is handed over.
func (r *receiver) keeps() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions)
}

// follows reports whether the events of another session with this id must come after
// those of one that this input has.
func (r *receiver) follows(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byID[id] != nil
}

// paused reports whether backpressure pauses the reads of a session.
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

// newStreamQuota is the quota of open streams. Where several sessions share it, none may
// have more than it leaves free; so one that has none may have the last.
func newStreamQuota(maxOpen int, shared bool) *quota.Quota {
	if !shared {
		return quota.New(int64(maxOpen), nil)
	}
	return quota.New(int64(maxOpen), func(held, free int64) bool { return held < free })
}
