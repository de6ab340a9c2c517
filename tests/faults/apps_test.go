package faults

import (
	"context"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// ledger notes what was sent and what came of it. A unit is what is acknowledged
// as a whole, a message or a stream, and has one text or several.
type ledger struct {
	t      *testing.T
	random *rand.Rand // the sender's
	lines  int        // of a unit, at most

	mu        sync.Mutex
	units     [][]string
	delivered [][]bool
	firsts    []string // keys of the first deliveries, in order
	again     int      // deliveries that were not the first
	accepted  int      // units
}

// unit makes the next unit to be sent.
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

// key is what a text starts with, as long for each.
func key(i, j int) string { return fmt.Sprintf("%06d.%02d ", i, j) }

// deliver notes a text that has arrived where it was to go.
func (l *ledger) deliver(text string) {
	var i, j int
	_, err := fmt.Sscanf(text, "%06d.%02d ", &i, &j)
	l.mu.Lock()
	defer l.mu.Unlock()
	sent := err == nil && i < len(l.units) && j < len(l.units[i]) && l.units[i][j] == text
	if !assert.Truef(l.t, sent, "delivered what was never sent: %.50q, %d bytes", text, len(text)) {
		return
	}
	if l.delivered[i][j] {
		l.again++
		return
	}
	l.delivered[i][j] = true
	l.firsts = append(l.firsts, key(i, j))
}

// accept notes an acknowledgement. All of the unit has to be delivered by now.
func (l *ledger) accept(i int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepted++
	for j, delivered := range l.delivered[i] {
		assert.Truef(l.t, delivered, "%s was acknowledged and not delivered", key(i, j))
	}
}

// wantInOrder wants all to be delivered, and in the order of sending the first
// time.
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

// queue is what is sent and not yet accepted, in order.
type queue struct {
	*ledger
	least  int // units
	more   func() bool
	queued []int
}

// next gives the units for the next write, in order, and whether there are any.
func (q *queue) next(limit int) ([]int, bool) {
	for len(q.queued) < limit && (len(q.units) < q.least || q.more()) {
		q.queued = append(q.queued, q.unit())
	}
	return q.queued[:min(limit, len(q.queued))], len(q.queued) > 0
}

// settle takes what was accepted out of the queue; errs is by index, or nil.
func (q *queue) settle(sent []int, errs []error) {
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

// sendTo is an application that sends all it has on the newest session there is,
// and again on the next what was not acknowledged.
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
				assert.Fail(q.t, "no session came", "%d units left", len(q.queued))
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
			assert.NoError(q.t, err, "on a session that lives")
			return
		}
	}
}

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
	q.settle(sent, errs)
	return err
}

func (q *queue) sendStream(ctx context.Context, s *cryo.Session, i int) error {
	source := strings.NewReader(strings.Join(q.units[i], "\n"))
	err := s.SendStream(ctx, source, &cryo.StreamOptions{Name: strconv.Itoa(i), ChunkBytes: 1 + q.random.IntN(5000)})
	q.settle([]int{i}, []error{err})
	return err
}

// receiveFrom is an application that notes what it receives, and acknowledges it
// then.
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

func (l *ledger) receive(ctx context.Context, s *cryo.Session, streams bool) bool {
	if !streams {
		m, err := s.Receive(ctx)
		if err != nil {
			return false
		}
		l.deliver(string(m.Payload))
		_ = m.Ack() // it may be too late
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
	_ = st.Ack() // it may be too late
	return true
}

// sessionOptions are those of the applications.
func sessionOptions(timing timing) cryo.SessionOptions {
	return cryo.SessionOptions{HeartbeatInterval: timing.heartbeat, CloseTimeout: time.Second}
}

// clientID is the session id of a dialling application.
const clientID = 4711

// redial is a client that has a session whenever it can.
func redial(ctx context.Context, address string, timing timing, sessions chan<- *cryo.Session) {
	for ctx.Err() == nil {
		s, err := cryo.Dial(ctx, "ws://"+address, &cryo.DialOptions{
			SessionOptions: sessionOptions(timing),
			Token:          token, SessionID: clientID, ConnectTimeout: timing.connect,
		})
		if err != nil {
			select {
			case <-time.After(50 * time.Millisecond): // as any client would
			case <-ctx.Done():
			}
			continue
		}
		sessions <- s
		select {
		case <-s.Done():
		case <-ctx.Done():
			hangUp(s)
		}
	}
}

func hangUp(s *cryo.Session) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.Close(ctx, "")
}

// serve is a server whose address is given, until the test's end.
func serve(t *testing.T, timing timing, sessions chan<- *cryo.Session) (address string) {
	t.Helper()
	server := newServer(t, cryo.ServerOptions{
		SessionOptions: sessionOptions(timing),
		Authorize:      cryo.Tokens(token),
		OnSession:      func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
	})
	socket := listen(t)
	h := &http.Server{Handler: server, ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0)}
	var serving sync.WaitGroup
	serving.Go(func() { _ = h.Serve(socket) })
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
		_ = h.Close()
		serving.Wait()
	})
	return socket.Addr().String()
}

// listening waits until a pipeline listens, and gives its address.
type listening chan string

func (l listening) Write(line []byte) (int, error) {
	if _, rest, ok := strings.Cut(string(line), "Listening for Cryo clients on "); ok {
		l <- strings.FieldsFunc(rest, func(r rune) bool { return r == '"' || r == ' ' || r == '\n' })[0]
	}
	return len(line), nil
}

func (l listening) address(t *testing.T) string {
	t.Helper()
	select {
	case address := <-l:
		return address
	case <-time.After(patience):
		require.FailNow(t, "the pipeline does not listen")
		return ""
	}
}

// newServer makes a server of valid options.
func newServer(tb testing.TB, opts cryo.ServerOptions) *cryo.Server {
	tb.Helper()
	server, err := cryo.NewServer(&opts)
	require.NoError(tb, err)
	return server
}
