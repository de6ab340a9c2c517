package cryo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/loglimit"
)

// The waits of a Client; see its comment.
const (
	ghostWait     = time.Second
	tokenWait     = 30 * time.Second
	firstWait     = 250 * time.Millisecond
	maxWait       = 10 * time.Second
	maxRetryAfter = 5 * time.Minute
	minLifetime   = time.Second // a shorter session counts as a failed attempt

	// maxLossWait bounds the random wait after the end of a session. The sessions of many clients end
	// together when their server stops.
	maxLossWait = time.Second
)

const (
	// maxLostSessions bounds the sessions in a row that end while Client.Send waits for the
	// acknowledgement of a message, because the message itself may end them.
	maxLostSessions = 10
	// maxResendWait bounds the random wait before a message is sent on a third or later
	// session. Another sender's message may end them: the random wait lets each of the
	// other messages be sent before it at some time.
	maxResendWait = 200 * time.Millisecond
)

// ClientOptions are the options of a [Client]. A zero value means its default.
type ClientOptions struct {
	// DialOptions are the options of each attempt. All sessions have the same id: SessionID, or a
	// random one that NewClient chooses. Logger also receives the failed attempts for which Await
	// or Send waited, at most one line per second.
	DialOptions

	// BeforeDial is called before each attempt with a copy of DialOptions, which it may change
	// for this attempt: a token that expires, headers or query parameters, or TLS with renewed
	// certificates. A change of SessionID has no effect. It is called on a goroutine of the
	// Client, never concurrently. Its context is done after ConnectTimeout and at Close, and it
	// must return then. If it returns an error, the attempt fails with that, which must not
	// contain a secret. Default: none.
	BeforeDial func(ctx context.Context, options *DialOptions) error

	// OnSession is called with each new session, before a method of the Client returns it,
	// and OnSessionEnd when Done of that session is closed, before the next one is dialled. The
	// calls alternate, on a goroutine of the Client that waits for them to return: start
	// another goroutine for long operations, such as receiving. They must not call Connect, Await, Send or
	// Close of the Client. Default: none.
	OnSession    func(*Session)
	OnSessionEnd func(*Session)
}

// Client has one session at a time with a server: when Connect, Await or Send is called and no
// session is connected, the Client dials, always with the same session id. It never dials
// without such a call, and concurrent calls share one attempt.
//
// After the end of a session, the wait until the next attempt is up to 1 s at random, so that the
// clients of a server that restarts do not connect at the same moment. After a failed attempt, the
// wait is
//
//   - the time in the server's Retry-After, if there is one, but at least 250 ms and at most
//     5 minutes, plus up to a quarter at random;
//   - else 1 s after [ErrSessionExists], which is temporary, and 30 s after
//     [ErrUnauthorized];
//   - else 250 ms, doubled with each further failure up to 10 s, and shortened by up to a
//     quarter at random.
//
// A session that ends within a second counts as a failed attempt of the last kind; if the peer
// has acknowledged a frame on it, the waits start again at 250 ms. They also do after a session
// that lasts longer.
//
// The application must receive the server's messages from each session, or set SendOnly.
//
// All methods may be called from any goroutine. A Client has at most one goroutine for a
// session and one for an attempt, and none before the first attempt and after Close.
type Client struct {
	target *target
	opts   ClientOptions
	closed context.Context // done when Close is called; that of each attempt
	close  context.CancelFunc

	mu       sync.Mutex
	session  *Session      // last session; nil before the first
	gone     chan struct{} // closed when session is over and OnSessionEnd has returned
	attempt  *attempt      // attempt in flight; nil if there is none
	failures int           // failed attempts in a row
	due      time.Time     // earliest time of the next attempt
	logLimit *loglimit.Limit
}

// attempt is one attempt to connect. Its callers wait under their own contexts, and it continues
// without them: its session serves later callers.
type attempt struct {
	awaited bool          // Await does not return the error, so it is logged; guarded by the Client's mu
	done    chan struct{} // closed when the following are set
	session *Session
	err     error // a *RetryError, or errClientClosed
}

// RetryError is the failure of a [Client]'s attempt to connect. The next attempt may succeed.
type RetryError struct {
	Err   error         // error of Dial or of BeforeDial
	After time.Duration // time until the next attempt, from the failure on
}

func (e *RetryError) Error() string {
	return fmt.Sprintf("%v (next attempt after %v)", e.Err, e.After.Round(time.Millisecond))
}

func (e *RetryError) Unwrap() error { return e.Err }

// errClientClosed is the error of a Client that was closed.
var errClientClosed error = &causedError{fmt.Errorf("client %w", ErrClosed), net.ErrClosed}

// NewClient creates a Client for a server. It checks the URL and the options, and dials nothing.
// The Client must be closed if it was used.
func NewClient(rawURL string, options *ClientOptions) (*Client, error) {
	var opts ClientOptions
	if options != nil {
		opts = *options
	}
	t, err := newTarget(rawURL, &opts.DialOptions)
	if err != nil {
		return nil, fmt.Errorf("creating a client: %w", err)
	}
	opts.DialOptions = opts.DialOptions.withDefaults()
	opts.Header = opts.Header.Clone()
	closed, cancel := context.WithCancel(context.Background())
	return &Client{
		target: t, opts: opts, closed: closed, close: cancel,
		logLimit: loglimit.New(),
	}, nil
}

// Session returns the session if one is connected, else nil.
func (c *Client) Session() *Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sessionLocked()
}

func (c *Client) sessionLocked() *Session {
	if c.session == nil || c.session.Err() != nil {
		return nil
	}
	return c.session
}

// Connect returns the session if one is connected. Otherwise it waits until the last session is
// over and the next attempt is due, and returns the result of that attempt: a session, or a
// [*RetryError] with the time until the next one. The context bounds the wait, not the attempt,
// whose session serves later callers. After Close the error is [ErrClosed].
func (c *Client) Connect(ctx context.Context) (*Session, error) { return c.connect(ctx, false) }

// Await repeats Connect until an attempt succeeds, the context is done, or the Client is closed.
// The error also wraps the error of the last attempt. A failed attempt is logged, and followed by
// another one whatever its error, because even a rejected token can become valid again. Use
// Connect to stop at certain errors.
//
// To receive, receive from the session until it has ended, and await the next one. If other
// goroutines await sessions too, a session may begin and end between two calls: use OnSession of
// [ClientOptions] to receive from each.
func (c *Client) Await(ctx context.Context) (*Session, error) {
	var last *RetryError
	for {
		s, err := c.connect(ctx, true)
		failed, ok := err.(*RetryError) //nolint:errorlint // unwrapped: a context's cause may wrap another RetryError
		switch {
		case ok:
			last = failed
		case err != nil && last != nil:
			return nil, fmt.Errorf("%w; the last attempt: %w", err, last.Err)
		default:
			return s, err
		}
	}
}

func (c *Client) connect(ctx context.Context, awaited bool) (*Session, error) {
	s, a, err := c.join(ctx, awaited)
	if a == nil {
		return s, err
	}
	select {
	case <-a.done:
		return a.session, a.err
	case <-ctx.Done():
		return nil, c.waitError(ctx)
	}
}

// join returns the session that is connected, or the attempt in flight, which it begins if
// there is none.
func (c *Client) join(ctx context.Context, awaited bool) (*Session, *attempt, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Err() != nil {
		return nil, nil, errClientClosed
	}
	if ctx.Err() != nil {
		return nil, nil, c.waitError(ctx)
	}
	if s := c.sessionLocked(); s != nil {
		return s, nil, nil
	}
	if c.attempt == nil {
		c.attempt = &attempt{done: make(chan struct{})}
		go c.run(c.attempt, c.gone)
	}
	c.attempt.awaited = c.attempt.awaited || awaited
	return nil, c.attempt, nil
}

func (c *Client) waitError(ctx context.Context) error {
	return fmt.Errorf("waiting for a session with %s: %w", c.target, contextError(ctx))
}

// run makes an attempt, and waits for the end of its session.
func (c *Client) run(a *attempt, lastGone <-chan struct{}) {
	s, err := c.dial(lastGone)
	began := time.Now()
	if s != nil && c.opts.OnSession != nil {
		c.opts.OnSession(s)
	}
	gone := make(chan struct{})
	c.mu.Lock()
	c.attempt = nil
	switch {
	case s != nil: // even after Close, which waits for the attempt and closes its session
		c.session, c.gone = s, gone
	case c.closed.Err() != nil:
		err = errClientClosed
	default:
		err = c.failedLocked(err)
	}
	report := err != nil && a.awaited && c.closed.Err() == nil
	c.mu.Unlock()
	if report {
		c.logFailure(err)
	}
	a.session, a.err = s, err
	close(a.done)
	if s != nil {
		c.follow(s, began)
		close(gone)
	}
}

// dial waits until the last session is over, because the server may reject another session with
// the same id, and until the attempt is due. Then it dials.
func (c *Client) dial(lastGone <-chan struct{}) (*Session, error) {
	if lastGone != nil {
		select {
		case <-lastGone:
		case <-c.closed.Done():
			return nil, errClientClosed
		}
	}
	c.mu.Lock()
	due := c.due
	c.mu.Unlock()
	if !pause(c.closed, time.Until(due)) {
		return nil, errClientClosed
	}
	opts, err := c.prepare()
	if err != nil {
		return nil, fmt.Errorf("dialling %s: %w", c.target, err)
	}
	return c.target.dial(c.closed, opts)
}

// prepare returns the options of an attempt.
func (c *Client) prepare() (DialOptions, error) {
	opts := c.opts.DialOptions
	if c.opts.BeforeDial == nil {
		return opts, nil
	}
	ctx, cancel := context.WithTimeout(c.closed, opts.ConnectTimeout)
	defer cancel()
	opts.Header, opts.Query = opts.Header.Clone(), maps.Clone(opts.Query)
	if err := c.opts.BeforeDial(ctx, &opts); err != nil {
		return opts, err
	}
	opts.SessionID = c.opts.SessionID
	return opts.withDefaults(), opts.validate()
}

// follow waits for the end of a session, and sets the due time of the next attempt.
func (c *Client) follow(s *Session, began time.Time) {
	<-s.Context().Done()
	ended := time.Now()
	<-s.Done() // all acknowledgements have been read
	if c.opts.OnSessionEnd != nil {
		c.opts.OnSessionEnd(s)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	short := ended.Sub(began) < minLifetime
	if !short || s.peerAcked.Load() {
		c.failures = 0
	}
	wait := rand.N(maxLossWait) //nolint:gosec // no secret
	if short {
		wait = c.backOffLocked()
	}
	c.due = ended.Add(wait)
}

// failedLocked sets the due time of the next attempt after a failed one, and returns a
// [*RetryError].
func (c *Client) failedLocked(err error) error {
	var (
		wait   time.Duration
		denied *HandshakeError
	)
	switch {
	case errors.As(err, &denied) && denied.RetryAfter > 0:
		wait = min(max(denied.RetryAfter, firstWait), maxRetryAfter)
		wait += rand.N(wait / 4) //nolint:gosec // no secret
	case errors.Is(err, ErrSessionExists):
		wait = ghostWait
	case errors.Is(err, ErrUnauthorized):
		wait = tokenWait
	default:
		wait = c.backOffLocked()
	}
	c.due = time.Now().Add(wait)
	return &RetryError{Err: err, After: wait}
}

// backOffLocked counts a failure and returns the wait until the next attempt.
func (c *Client) backOffLocked() time.Duration {
	wait := min(firstWait<<min(c.failures, 10), maxWait)
	c.failures++
	return wait - rand.N(wait/4) //nolint:gosec // no secret
}

// logFailure logs a failed attempt. It logs without a lock held, because a log handler may call
// the Client.
func (c *Client) logFailure(err error) {
	if suppressed, ok := c.logLimit.Allow(); ok {
		c.opts.Logger.Warn("Connecting failed, retrying", "error", err, "suppressed", suppressed)
	}
}

// Send sends messages in order, on the session that is connected or on the next one, and
// waits until each is acknowledged. When the session ends before that, the unacknowledged
// messages are sent again on the next session: they may arrive twice. The context bounds all
// attempts together.
//
// A [*BatchError] has the errors of the messages that were not acknowledged: a [*RejectedError] or
// the error of a message that can't be sent, neither of which is sent again; the context's error
// and its cause; [ErrClosed] after Close; or the end of the last of 10 sessions in a row that
// ended without acknowledging or rejecting any of the remaining messages, because a message may
// itself end the sessions.
func (c *Client) Send(ctx context.Context, messages []OutMessage) error {
	errs := make([]error, len(messages))
	left := make([]int, len(messages)) // indexes of messages to send
	for i := range left {
		left[i] = i
	}
	for lost := 0; len(left) > 0; {
		s, err := c.Await(ctx)
		if err != nil {
			for _, i := range left {
				errs[i] = afterLoss(errs[i], err)
			}
			break
		}
		if lost > 1 {
			pause(ctx, rand.N(maxResendWait)) //nolint:gosec // no secret
		}
		if s.Err() != nil {
			continue // no message was sent on it
		}
		before := len(left)
		left = sendLeft(ctx, s, messages, left, errs)
		if lost++; len(left) < before {
			lost = 1
		}
		if lost == maxLostSessions {
			for _, i := range left {
				errs[i] = fmt.Errorf("%d sessions in a row ended without acknowledging the message; last error: %w", maxLostSessions, errs[i])
			}
			break
		}
	}
	for _, err := range errs {
		if err != nil {
			return &BatchError{Errs: errs}
		}
	}
	return nil
}

// sendLeft sends the messages with the indexes left on a session. It sets their errors, and
// returns the indexes of those that must be sent again because the session has ended.
func sendLeft(ctx context.Context, s *Session, messages []OutMessage, left []int, errs []error) []int {
	part := messages
	if len(left) < len(messages) {
		part = make([]OutMessage, len(left))
		for at, i := range left {
			part[at] = messages[i]
		}
	}
	err := s.SendBatch(ctx, part)
	failed, isBatch := errors.AsType[*BatchError](err)
	lost := left[:0]
	for at, i := range left {
		errs[i] = err
		if isBatch {
			errs[i] = failed.Errs[at]
		}
		if _, ended := errors.AsType[*endedError](errs[i]); ended {
			lost = append(lost, i)
		}
	}
	return lost
}

// afterLoss returns the error of a message that could not be sent again; lost is the end of the
// session on which it was sent, nil if it was not sent.
func afterLoss(lost, err error) error {
	if lost == nil {
		return err
	}
	return fmt.Errorf("%w; %w", lost, err)
}

// Close ends the attempt in flight, and closes the session as [Session.Close] does. The Client
// does not dial again: calls that wait for a session return [ErrClosed], and so does Send for each
// message that is not acknowledged. Close returns when the goroutines of the Client are gone, and
// may be called more than once. Its error is the context's.
func (c *Client) Close(ctx context.Context, reason string) error {
	c.close()
	c.mu.Lock()
	a := c.attempt
	c.mu.Unlock()
	if a != nil {
		<-a.done
	}
	c.mu.Lock()
	s, gone := c.session, c.gone
	c.mu.Unlock()
	if s == nil {
		return nil
	}
	err := s.Close(ctx, reason)
	<-gone
	return err
}

// pause waits, and returns false if the context is done.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
