package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const closeTime = 10 * time.Second // for the close handshake; the engine sets no limit

// dialer is the engine's view of a [cryo.Client], which has the sessions and the waits
// between attempts. It adds log lines, metrics and the errors that the engine expects.
type dialer struct {
	client  *cryo.Client
	url     string // of the server
	name    string // the URL without its query, for log lines
	opts    cryo.DialOptions
	log     *service.Logger
	metrics dialMetrics

	again   bool           // a session was connected before; used by connected alone
	reports sync.WaitGroup // the goroutine that logs the end of the session

	logged   atomic.Pointer[cryo.RetryError] // the last failure that await has logged
	awaitLog limitedLog                      // of await
}

// errDialerClosed is the error of those who wait for a session when the component closes.
var errDialerClosed = errors.New("the component is closed")

// dialerFromParsed makes a dialer. The options of opts that the configuration has a field for are
// those of the configuration.
func dialerFromParsed(conf *service.ParsedConfig, res *service.Resources, opts cryo.DialOptions) (*dialer, error) {
	d := &dialer{opts: opts, log: res.Logger()}
	u, err := readDialOptions(conf, &d.opts)
	if err != nil {
		return nil, err
	}
	d.url, d.name = u.String(), (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	d.metrics = newDialMetrics(meterOf(res))
	d.awaitLog = newLimitedLog(d.log)
	d.opts.Logger = libraryLogger(d.log)
	d.metrics.watch(&d.opts.SessionOptions)
	d.client, err = cryo.NewClient(d.url, &cryo.ClientOptions{DialOptions: d.opts, OnSession: d.connected, OnSessionEnd: d.ended})
	return d, err
}

// connected is the client's OnSession. It reports the session, and the end of it when it
// begins: the engine may not notice it for long, and Done may be a close timeout away.
func (d *dialer) connected(s *cryo.Session) {
	verb := "Connected"
	if d.again {
		verb = "Reconnected"
	}
	d.log.Infof("%s to %s as session %d", verb, d.name, s.ID())
	d.metrics.connected(d.again)
	d.again = true
	d.reports.Go(func() {
		<-s.Context().Done()
		d.reportEnd(s.Err())
	})
}

// ended is the client's OnSessionEnd. The end is logged before the next session can be.
func (d *dialer) ended(*cryo.Session) {
	d.reports.Wait()
	d.metrics.gone()
}

func (d *dialer) reportEnd(err error) {
	var closed *cryo.PeerClosedError
	switch {
	case errors.Is(err, cryo.ErrClosed):
		d.log.Infof("Closed the session with %s", d.name)
	case errors.As(err, &closed): // a server that restarts is no fault
		d.log.Infof("Disconnected from %s: %v", d.name, err)
	default:
		d.log.Warnf("Disconnected from %s: %v", d.name, err)
	}
}

// connect returns the session, or the result of one attempt. The engine logs a failure, and
// connects again when the next attempt is due.
func (d *dialer) connect(ctx context.Context) (*cryo.Session, error) {
	s, err := d.client.Connect(ctx)
	if failed, ok := errors.AsType[*cryo.RetryError](err); ok {
		return nil, service.NewErrBackOff(withHint(failed), failed.After)
	}
	if errors.Is(err, cryo.ErrClosed) {
		err = errDialerClosed
	}
	return s, err
}

// await returns the session, or that of the first attempt that succeeds before the context
// is done. Failures go to the log, each once for all who await the session.
func (d *dialer) await(ctx context.Context) (*cryo.Session, error) {
	var last error
	for {
		s, err := d.client.Connect(ctx)
		failed, ok := errors.AsType[*cryo.RetryError](err)
		switch {
		case ok:
			last = withHint(failed)
			if d.logged.Swap(failed) != failed {
				if log, ok := d.awaitLog.allow(); ok {
					log.Warnf("Connecting to %s again failed, messages wait for it: %v", d.name, last)
				}
			}
		case errors.Is(err, cryo.ErrClosed):
			return nil, errDialerClosed
		case err != nil && last != nil:
			return nil, fmt.Errorf("%w: %v", context.Cause(ctx), last) //nolint:errorlint // its cause is not the caller's
		case err != nil:
			return nil, context.Cause(ctx)
		default:
			return s, nil
		}
	}
}

// withHint adds what the user can do to the error of an attempt.
func withHint(failed *cryo.RetryError) error {
	switch err := failed.Err; {
	case errors.Is(err, cryo.ErrSessionExists):
		return fmt.Errorf("%w (if that is our own lost connection, it passes within seconds)", err)
	case errors.Is(err, cryo.ErrUnauthorized):
		return fmt.Errorf("%w (check the field %s; trying again in %v)", err, fieldToken, failed.After.Round(time.Second))
	default:
		return err
	}
}

// close closes the client, with a bound of its own beside the engine's. A session that is
// ending already is waited for: acknowledgements may still be written.
func (d *dialer) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	return d.client.Close(ctx, "")
}

// test dials as another session and closes it. What the server sends to it
// meanwhile is neither acknowledged nor rejected: after the close handshake it goes to others.
func (d *dialer) test(ctx context.Context) service.ConnectionTestResults {
	opts := d.opts
	opts.SendOnly = false // an output's would reject
	s, err := cryo.Dial(ctx, d.url, &opts)
	if err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	if err := s.Close(ctx, "connection test"); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	return service.ConnectionTestSucceeded().AsList()
}
