package plugin

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
)

// brokenListener fails to accept when the test wants it to.
type brokenListener struct {
	net.Listener
	fail chan error
}

func (b *brokenListener) Accept() (net.Conn, error) {
	type accepted struct {
		conn net.Conn
		err  error
	}
	result := make(chan accepted, 1)
	go func() {
		conn, err := b.Listener.Accept()
		result <- accepted{conn, err}
	}()
	select {
	case a := <-result:
		return a.conn, a.err
	case err := <-b.fail:
		_ = b.Listener.Close()
		<-result
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: err}
	}
}

// breakable makes the first listener of an engine one that the test can break. It returns a
// channel for its error, and one that has the time of each call of listen.
func breakable(e *engine) (fail chan error, listened chan time.Time) {
	fail, listened = make(chan error), make(chan time.Time, 100)
	listen, first := e.shared.listen, true
	e.shared.listen = func(network, address string) (net.Listener, error) {
		listened <- time.Now()
		l, err := listen(network, address)
		if first && err == nil {
			first = false
			return &brokenListener{l, fail}, nil
		}
		return l, err
	}
	return fail, listened
}

var errAccept = syscall.ENOMEM // no net.Error that is temporary

func TestInputReopensTheListenerWhenAcceptingFails(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, listened := breakable(e)
		p := e.run(listenInput, toProbe)
		<-listened
		client := e.dial()
		inFlight := send(client, "in flight")
		waiting := e.arrival()

		fail <- errAccept
		time.Sleep(time.Second)

		require.Len(t, listened, 1)
		e.log.want(t, "ERROR Listener failed: listening again")
		require.Equal(t, 1, e.log.count("ERROR "))
		require.Equal(t, int64(1), e.metrics.value("input_connection_lost"), "so /ready has reported it")
		require.Equal(t, int64(2), e.metrics.value("input_connection_up"))
		require.Equal(t, int64(1), e.metrics.value("cryo_sessions"))

		inFlight.wantPending(t, "its delivery goes on")
		waiting.deliver()
		inFlight.wantAcked(t, "on the session that it came from")
		for _, s := range []*sending{send(client, "later"), send(e.dial(), "of a new client")} {
			e.arrival().deliver()
			s.wantAcked(t, "the input receives from both")
		}
		p.stop()
		require.Equal(t, 1, e.log.count("Listener closed"))
	})
}

func TestBusyInputReopensTheListener(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, listened := breakable(e)
		e.run(with(listenInput, "max_batch_count: 1"), toSerial)
		<-listened
		client := e.dial()
		for i := range 20 {
			send(client, fmt.Sprint(i))
		}
		synctest.Wait()

		fail <- errAccept
		for range 3 {
			e.arrival().deliver()
			time.Sleep(time.Second)
		}

		require.Len(t, listened, 1, "with messages left")
		for range 17 {
			e.arrival().deliver()
		}
	})
}

func TestReopeningTheListenerIsRetriedUntilItSucceeds(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		var refuse atomic.Bool
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			if refuse.Load() {
				return nil, &net.OpError{Op: "listen", Net: "tcp", Err: syscall.EMFILE}
			}
			return listen(network, address)
		}
		fail, listened := breakable(e)
		e.run(listenInput, toProbe)
		client := e.dial()
		refuse.Store(true)

		fail <- errAccept
		synctest.Wait()
		m := send(client, "waits")
		time.Sleep(time.Minute)
		m.wantPending(t, "the input is not connected")
		e.wantNoArrival("it does not read")
		require.Greater(t, len(listened), 3)
		require.Less(t, len(listened), 200, "with the engine's back-off")
		require.Equal(t, int64(1), e.metrics.value("input_connection_up"))
		e.log.want(t, "too many open files: raise the limit of open files")

		refuse.Store(false)
		e.arrival().deliver()
		m.wantAcked(t, "the input is connected again")
		send(e.dial(), "of a new client")
		e.arrival().deliver()
	})
}

func TestOutputReopensTheListenerWithItsNextMessage(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, listened := breakable(e)
		e.run(fromFeed, listenOutput)
		<-listened
		client := e.dial()

		fail <- errAccept
		synctest.Wait()
		f := e.produce("m")
		require.NoError(t, receiveTexts(t, client, "m")[0].Ack())

		f.wantDelivered(t, "to the session that stayed connected")
		require.Len(t, listened, 1)
		require.Equal(t, int64(1), e.metrics.value("output_connection_lost"))
		e.dial()
	})
}

func TestOneComponentReopensTheListenerForAll(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, listened := breakable(e)
		in := e.run(listenInput, toProbe)
		<-listened
		e.run(fromFeed, listenOutput)
		client := e.dial()

		fail <- errAccept
		time.Sleep(time.Second)

		require.Len(t, listened, 1)
		e.wantSends(t, client, "the output never noticed")
		require.Zero(t, e.metrics.value("output_connection_lost"))
		in.stop()
		e.dial()
	})
}

func TestComponentThatJoinsABrokenListenerReopensIt(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, listened := breakable(e)
		e.run(fromFeed, listenOutput)
		<-listened
		fail <- errAccept
		synctest.Wait()
		require.Empty(t, listened, "the output has nothing to send")

		e.run(listenInput, toProbe)

		require.Len(t, listened, 1)
		send(e.dial(), "m")
		e.arrival().deliver()
	})
}

func TestBrokenListenerCanBeClosed(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, _ := breakable(e)
		p := e.run(fromFeed, listenOutput)
		fail <- errAccept
		synctest.Wait()
		p.stop()
		require.Equal(t, 1, e.log.count("Listener closed"))
	})
}

func TestTemporaryAcceptErrorsAreLogged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			l, err := listen(network, address)
			return &exhaustedListener{l, 20}, err
		}
		e.run(listenInput, toProbe)
		time.Sleep(20 * time.Second)

		e.dial()
		lines := e.log.count("WARN Cannot accept clients; retrying")
		require.Greater(t, lines, 5)
		require.Less(t, lines, 20, "at most one a second")
		e.log.want(t, "too many open files; retrying in 5ms: raise the limit of open files")
		require.Zero(t, e.log.count("ERROR "))
	})
}

// exhaustedListener has no descriptor for a number of times.
type exhaustedListener struct {
	net.Listener
	times int
}

func (l *exhaustedListener) Accept() (net.Conn, error) {
	if l.times > 0 {
		l.times--
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestHTTPServerErrorsAreLoggedAtTheRightLevel(t *testing.T) {
	book := &logBook{}
	log := serverLog(service.NewLoggerFromSlog(book.logger()))
	log.Print("http: panic serving 10.0.0.1:1: boom\ngoroutine 1 [running]:")
	log.Print("http: TLS handshake error from 10.0.0.1:1: EOF")
	log.Print("http: Accept error: " + errors.New("connection aborted").Error() + "; retrying in 5ms")
	book.want(t, "WARN Panic during the handshake of a client")
	book.want(t, "DEBUG Malformed HTTP request or TLS handshake")
	book.want(t, "WARN Cannot accept clients; retrying")
	require.Zero(t, book.count("raise the limit"))
}
