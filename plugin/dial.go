package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// closeTime limits how long a component takes to close, because the engine sets no limit.
const closeTime = 10 * time.Second

// dialer adapts a [cryo.Client] to the engine. The client owns the sessions, and waits between
// the attempts to connect; the dialer adds log lines, metrics and the errors that the engine
// expects.
type dialer struct {
	client  *cryo.Client
	url     string
	logURL  string // url without its query, which may contain secrets
	opts    cryo.DialOptions
	attempt *attemptOptions
	log     *service.Logger
	metrics dialMetrics

	connectedBefore bool           // accessed only by connected
	endLogs         sync.WaitGroup // tracks the goroutine that logs the end of the session
	endLog          limitedLog
	lateLoss        *time.Timer // logs the last end, if it was not logged immediately; written by that goroutine

	lastLogged atomic.Pointer[cryo.RetryError] // the last failure that await has logged
	awaitLog   limitedLog
}

// errDialerClosed is the error for callers that wait for a session while the component closes.
var errDialerClosed = errors.New("the component is closed")

// dialerFromParsed returns a dialer with the fields of a configuration. They override those of
// opts, which contains the options for which there are no fields.
func dialerFromParsed(conf *service.ParsedConfig, res *service.Resources, opts cryo.DialOptions) (*dialer, error) {
	d := &dialer{opts: opts, log: res.Logger()}
	u, attempt, err := readDialOptions(conf, &d.opts, d.log)
	if err != nil {
		return nil, err
	}
	d.attempt = attempt
	d.url, d.logURL = u.String(), (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	d.metrics = newDialMetrics(meterOf(res))
	d.awaitLog, d.endLog = newLimitedLog(d.log), newLimitedLog(d.log)
	d.opts.Logger = libraryLogger(d.log)
	d.metrics.watch(&d.opts.SessionOptions)
	d.client, err = cryo.NewClient(d.url, &cryo.ClientOptions{DialOptions: d.opts, BeforeDial: attempt.evaluate, OnSession: d.connected, OnSessionEnd: d.ended})
	return d, err
}

// connected is the client's OnSession. It logs that the session is connected. It also logs its
// loss, as soon as the session begins to end, because the engine may notice the loss much
// later, and the close timeout may delay Done. A server may end each session immediately, so at most
// one loss a second is logged immediately. A further loss is logged a second late, and only if no
// session has followed. A reconnection is logged only if the loss before it was. So the last of
// these lines is true after a second.
func (d *dialer) connected(s *cryo.Session) {
	log := d.log.With("url", d.logURL, "session", s.ID())
	switch {
	case !d.connectedBefore:
		log.Info("Connected")
	case d.lateLoss == nil || !d.lateLoss.Stop():
		log.Info("Reconnected")
	}
	d.lateLoss = nil
	d.metrics.connected(d.connectedBefore)
	d.connectedBefore = true
	d.endLogs.Go(func() {
		<-s.Context().Done()
		d.logEnd(s.Err())
	})
}

// ended is the client's OnSessionEnd. It waits until the end has been logged, so that this line
// precedes the lines of the next session.
func (d *dialer) ended(*cryo.Session) {
	d.endLogs.Wait()
	d.metrics.disconnected()
}

func (d *dialer) logEnd(err error) {
	if errors.Is(err, cryo.ErrClosed) {
		d.log.With("url", d.logURL).Info("Session closed")
		return
	}
	if log, ok := d.endLog.allow(); ok {
		d.logLoss(log, err)
	} else {
		d.lateLoss = time.AfterFunc(time.Second, func() { d.logLoss(d.log, err) })
	}
}

func (d *dialer) logLoss(log *service.Logger, err error) {
	log = log.With("url", d.logURL, "error", err)
	if _, closed := errors.AsType[*cryo.PeerClosedError](err); closed { // for example, because the server restarts
		log.Info("Disconnected")
	} else {
		log.Warn("Disconnected")
	}
}

// connect returns the session. If there is none, it makes one attempt to connect when that is due.
// The engine logs a failure, and calls Connect again immediately: the client waits, not the engine, so
// that the end of the context ends the wait.
func (d *dialer) connect(ctx context.Context) (*cryo.Session, error) {
	s, err := d.client.Connect(ctx)
	if failed, ok := errors.AsType[*cryo.RetryError](err); ok {
		return nil, service.NewErrBackOff(withHint(failed), 0)
	}
	if errors.Is(err, cryo.ErrClosed) {
		err = errDialerClosed
	}
	return s, err
}

// await returns the session, or waits until an attempt to connect succeeds or the context is
// done. Each failed attempt is logged once, no matter how many callers wait.
func (d *dialer) await(ctx context.Context) (*cryo.Session, error) {
	var last error
	for {
		s, err := d.client.Connect(ctx)
		failed, ok := errors.AsType[*cryo.RetryError](err)
		switch {
		case ok:
			last = withHint(failed)
			if d.lastLogged.Swap(failed) != failed {
				if log, ok := d.awaitLog.allow(); ok {
					log.With("url", d.logURL, "error", last).Warn("Reconnecting failed; unacknowledged messages wait for the next attempt")
				}
			}
		case errors.Is(err, cryo.ErrClosed):
			return nil, errDialerClosed
		case err != nil && last != nil:
			return nil, fmt.Errorf("%w: %v", context.Cause(ctx), last) //nolint:errorlint // callers must not match the cause of an attempt
		case err != nil:
			return nil, context.Cause(ctx)
		default:
			return s, nil
		}
	}
}

// urlHint returns advice about the field url for the error of an attempt to connect, or "".
func urlHint(err error) string {
	denied, ok := errors.AsType[*cryo.HandshakeError](err)
	switch {
	case ok && denied.StatusCode == http.StatusNotFound:
		return fmt.Sprintf("check the path of the field %s", fieldURL)
	case ok && denied.StatusCode/100 == 3:
		return fmt.Sprintf("redirects are not followed: set the field %s to the target", fieldURL)
	}
	return ""
}

// withHint adds advice for the user to the error of a failed attempt to connect.
func withHint(failed *cryo.RetryError) error {
	switch err := failed.Err; {
	case urlHint(err) != "":
		return fmt.Errorf("%w (%s)", err, urlHint(err))
	case errors.Is(err, cryo.ErrSessionExists):
		return fmt.Errorf("%w (if that is the previous connection of this component, the server removes it within seconds)", err)
	case errors.Is(err, cryo.ErrUnauthorized):
		return fmt.Errorf("%w (check the field %s; retrying in %v)", err, fieldToken, failed.After.Round(time.Second))
	default:
		return err
	}
}

// withTestHint adds advice for the user to the error of a connection test.
func withTestHint(err error) error {
	var name *net.DNSError
	var network net.Error
	switch {
	case errors.Is(err, cryo.ErrUnauthorized):
		return fmt.Errorf("%w (check the field %s)", err, fieldToken)
	case urlHint(err) != "":
		return fmt.Errorf("%w (%s)", err, urlHint(err))
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w (unreachable: no process listens on that address)", err)
	case errors.As(err, &name):
		return fmt.Errorf("%w (check the host of the field %s)", err, fieldURL)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.As(err, &network) && network.Timeout():
		return fmt.Errorf("%w (unreachable: check the address and any firewall in between)", err)
	default:
		return err
	}
}

// close closes the client within closeTime. It also waits for a session that is already ending,
// because the session may still write acknowledgements.
func (d *dialer) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	return d.client.Close(ctx, "")
}

// test opens another session and closes it. It neither acknowledges nor rejects messages that
// the server sends to it, so that the server can send them on another session.
func (d *dialer) test(ctx context.Context) service.ConnectionTestResults {
	opts := d.opts
	opts.SendOnly = false // an output's session would reject messages
	if err := d.attempt.evaluate(ctx, &opts); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	s, err := cryo.Dial(ctx, d.url, &opts)
	if err != nil {
		return service.ConnectionTestFailed(withTestHint(err)).AsList()
	}
	if err := s.Close(ctx, "connection test"); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	return service.ConnectionTestSucceeded().AsList()
}
