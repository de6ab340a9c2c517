package faults

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// ledger records what was sent, delivered and acknowledged. A unit is a message or a
// stream, which is acknowledged as a whole, and has one text or several.
type ledger struct {
	t      *testing.T
	random *rand.Rand // owned by the sender
	lines  int        // maximum texts of a unit

	mu        sync.Mutex
	units     [][]string
	delivered [][]bool
	firsts    []string // keys of the first deliveries, in order
	again     int      // deliveries that were not the first
	accepted  int      // acknowledged units
}

// unit adds the next unit, and returns its index.
func (l *ledger) unit() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := len(l.units)
	texts := make([]string, 1+l.random.IntN(l.lines))
	for j := range texts {
		size := l.random.IntN(1000)
		if l.random.IntN(50) == 0 {
			size = l.random.IntN(50_000)
		}
		texts[j] = key(i, j) + strings.Repeat(string(rune('a'+l.random.IntN(26))), size)
	}
	l.units = append(l.units, texts)
	l.delivered = append(l.delivered, make([]bool, len(texts)))
	return i
}

// key is the beginning of a text, of fixed length.
func key(i, j int) string { return fmt.Sprintf("%06d.%02d ", i, j) }

// deliver records the delivery of a text.
func (l *ledger) deliver(text string) {
	var i, j int
	_, err := fmt.Sscanf(text, "%06d.%02d ", &i, &j)
	l.mu.Lock()
	defer l.mu.Unlock()
	sent := err == nil && i < len(l.units) && j < len(l.units[i]) && l.units[i][j] == text
	if !assert.Truef(l.t, sent, "delivered and never sent: %.50q, %d bytes", text, len(text)) {
		return
	}
	if l.delivered[i][j] {
		l.again++
		return
	}
	l.delivered[i][j] = true
	l.firsts = append(l.firsts, key(i, j))
}

// accept records the acknowledgement of a unit, which must be delivered completely.
func (l *ledger) accept(i int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepted++
	for j, delivered := range l.delivered[i] {
		assert.Truef(l.t, delivered, "%s was acknowledged and not delivered", key(i, j))
	}
}

// wantInOrder wants every unit to be acknowledged, and the first deliveries to be in the
// order of sending.
func (l *ledger) wantInOrder() {
	l.mu.Lock()
	defer l.mu.Unlock()
	var want []string
	for i, texts := range l.units {
		for j := range texts {
			want = append(want, key(i, j))
		}
	}
	assert.Equal(l.t, len(l.units), l.accepted)
	assert.Equal(l.t, want, l.firsts)
}

// queue holds the unacknowledged units, in order.
type queue struct {
	*ledger
	least  int         // minimum units to send
	more   func() bool // whether to send more than that
	queued []int
}

// next returns the units of the next write, in order, and whether there are any.
func (q *queue) next(limit int) ([]int, bool) {
	for len(q.queued) < limit && (len(q.units) < q.least || q.more()) {
		q.queued = append(q.queued, q.unit())
	}
	return q.queued[:min(limit, len(q.queued))], len(q.queued) > 0
}

// remove removes the acknowledged units from the queue. errs has an error for each sent
// unit; nil is none at all.
func (q *queue) remove(sent []int, errs []error) {
	var left []int
	for n, i := range sent {
		if errs != nil && errs[n] != nil {
			left = append(left, i)
		} else {
			q.accept(i)
		}
	}
	q.queued = append(left, q.queued[len(sent):]...)
}

// sendTo is an application that sends its units on its newest session, and sends the
// unacknowledged ones again on the next session.
func (q *queue) sendTo(ctx context.Context, sessions <-chan *cryo.Session, streams bool) {
	var s *cryo.Session
	for {
		limit := 1 + q.random.IntN(40)
		if streams {
			limit = 1
		}
		sent, more := q.next(limit)
		if !more {
			return
		}
		if s == nil || s.Err() != nil {
			select {
			case s = <-sessions:
			case <-ctx.Done():
				assert.Fail(q.t, "timed out waiting for a session", "%d units left", len(q.queued))
				return
			}
			continue
		}
		var err error
		if streams {
			err = q.sendStream(ctx, s, sent[0])
		} else {
			err = q.sendBatch(ctx, s, sent)
		}
		if err != nil && s.Err() == nil {
			assert.NoError(q.t, err, "on a session that has not ended")
			return
		}
	}
}

// sendBatch sends messages in a batch, and removes the acknowledged ones.
func (q *queue) sendBatch(ctx context.Context, s *cryo.Session, sent []int) error {
	batch := make([]cryo.OutMessage, len(sent))
	for n, i := range sent {
		batch[n] = cryo.Text(q.units[i][0])
	}
	err := s.SendBatch(ctx, batch)
	var errs []error
	if failed, ok := err.(*cryo.BatchError); ok { //nolint:errorlint // it is SendBatch's own
		errs = failed.Errs
	}
	q.remove(sent, errs)
	return err
}

// sendStream sends a unit as a stream, and removes it if it is acknowledged.
func (q *queue) sendStream(ctx context.Context, s *cryo.Session, i int) error {
	source := strings.NewReader(strings.Join(q.units[i], "\n"))
	err := s.SendStream(ctx, source, &cryo.StreamOptions{Name: strconv.Itoa(i), ChunkBytes: 1 + q.random.IntN(5000)})
	q.remove([]int{i}, []error{err})
	return err
}

// receiveFrom is an application that records what it receives, and then acknowledges it.
func (l *ledger) receiveFrom(ctx context.Context, sessions <-chan *cryo.Session, streams bool) {
	var receiving sync.WaitGroup
	defer receiving.Wait()
	for {
		select {
		case s := <-sessions:
			receiving.Go(func() {
				for more := true; more && ctx.Err() == nil; {
					more = l.receive(ctx, s, streams)
				}
			})
		case <-ctx.Done():
			return
		}
	}
}

// receive receives and acknowledges a message or a stream; false is the end of the
// session.
func (l *ledger) receive(ctx context.Context, s *cryo.Session, streams bool) bool {
	if !streams {
		m, err := s.Receive(ctx)
		if err != nil {
			return false
		}
		l.deliver(string(m.Payload))
		_ = m.Ack() // the session may have ended
		return true
	}
	st, err := s.AcceptStream(ctx)
	if err != nil {
		return false
	}
	content, err := io.ReadAll(st)
	if err != nil {
		return s.Err() == nil
	}
	l.deliver(string(content))
	_ = st.Ack() // the session may have ended
	return true
}

// clientID is the session id of an application that dials.
const clientID = 4711

// sessionOptions returns the options of the applications.
func sessionOptions(timing timing) cryo.SessionOptions {
	return cryo.SessionOptions{HeartbeatInterval: timing.heartbeat, CloseTimeout: time.Second}
}
