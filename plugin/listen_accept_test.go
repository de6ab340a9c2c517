package plugin

import (
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
// channel for its error, and one that has the time of each call to listen.
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

var errAccept = syscall.EINVAL // no shortage, which would be waited for

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
		e.log.want(t, "ERROR Listener failed: reopening its address")
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
		require.Less(t, len(listened), 200, "at most one attempt a second")
		require.LessOrEqual(t, e.log.count("ERROR Cannot listen; retrying"), 60)
		require.Zero(t, e.metrics.value("cryo_listening"))
		require.Greater(t, e.metrics.value("cryo_listener_errors{kind=socket}"), int64(50))
		require.Equal(t, int64(1), e.metrics.value("input_connection_up"))
		e.log.want(t, "too many open files: raise the limit of open files")

		refuse.Store(false)
		e.arrival().deliver()
		m.wantAcked(t, "the input is connected again")
		send(e.dial(), "of a new client")
		e.arrival().deliver()
	})
}

func TestListenerOfAnIdleOutputReopensByItself(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		fail, listened := breakable(e)
		e.run(fromFeed, listenOutput)
		<-listened
		client := e.dial()

		fail <- errAccept
		synctest.Wait()

		require.Len(t, listened, 1, "without a message")
		e.dial()
		end(e.dial())
		e.wantSends(t, client, "the session stayed connected")
		require.Zero(t, e.metrics.value("output_connection_lost"))
	})
}

func TestOutputIsNotConnectedWhileItsListenerCannotBeOpened(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		var refuse atomic.Bool
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			if refuse.Load() {
				return nil, &net.OpError{Op: "listen", Net: "tcp", Err: syscall.EADDRINUSE}
			}
			return listen(network, address)
		}
		fail, _ := breakable(e)
		e.run(fromFeed, listenOutput)
		client := e.dial()
		refuse.Store(true)

		fail <- errAccept
		time.Sleep(time.Second)
		f := e.produce("m")
		f.wantPending(t, "so /ready reports it")
		require.Equal(t, int64(1), e.metrics.value("output_connection_lost"))
		e.log.want(t, "Failed to connect to cryo_server", "stop it, or use another port")

		refuse.Store(false)
		require.NoError(t, receiveTexts(t, client, "m")[0].Ack())
		f.wantDelivered(t, "to the session that stayed connected")
		require.Equal(t, int64(1), e.metrics.value("cryo_listening"))
	})
}

// A socket that fails whenever it is opened must not flood the log.
func TestListenerThatFailsRepeatedlyBacksOff(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		listen := e.shared.listen
		var opened atomic.Int64
		e.shared.listen = func(network, address string) (net.Listener, error) {
			l, err := listen(network, address)
			if opened.Add(1) > 60 || err != nil {
				return l, err
			}
			fail := make(chan error, 1)
			fail <- errAccept
			return &brokenListener{l, fail}, nil
		}
		e.run(listenInput, toProbe)
		time.Sleep(30 * time.Second)
		require.Less(t, opened.Load(), int64(40), "a second apart")
		require.LessOrEqual(t, e.log.count("ERROR Listener failed"), 31)
		require.LessOrEqual(t, e.log.count("INFO Listening for"), 31)
		require.Equal(t, opened.Load(), e.metrics.value("cryo_listener_errors{kind=socket}"), "each is counted")

		time.Sleep(time.Minute)
		e.wantReceives(t, e.dial(), "it listens again")
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

func TestComponentCanJoinAListenerThatIsDown(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		var refuse atomic.Bool
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			if refuse.Load() {
				return nil, &net.OpError{Op: "listen", Net: "tcp", Err: syscall.EMFILE}
			}
			return listen(network, address)
		}
		fail, _ := breakable(e)
		e.run(fromFeed, listenOutput)
		client := e.dial()
		refuse.Store(true)
		fail <- errAccept
		synctest.Wait()

		e.run(listenInput, toProbe)
		m := send(client, "m")
		time.Sleep(10 * time.Second)
		m.wantPending(t, "the input is not connected")

		refuse.Store(false)
		e.arrival().deliver()
		m.wantAcked(t, "from the session that stayed connected")
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

func TestShortagesAreLoggedAndWaitedFor(t *testing.T) {
	for errno, c := range map[syscall.Errno]struct{ kind, hint string }{
		syscall.EMFILE:  {"files", "ulimit -n, LimitNOFILE="},
		syscall.ENFILE:  {"files", "fs.file-max"},
		syscall.ENOBUFS: {"memory", "memory"},
		syscall.ENOMEM:  {"memory", "memory"},
	} {
		t.Run(errno.Error(), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				listen := e.shared.listen
				e.shared.listen = func(network, address string) (net.Listener, error) {
					l, err := listen(network, address)
					return &exhaustedListener{l, errno, 20}, err
				}
				e.run(listenInput, toProbe)
				time.Sleep(5 * time.Second)
				require.Zero(t, e.metrics.value("cryo_listening"))
				time.Sleep(15 * time.Second)
				require.Equal(t, int64(1), e.metrics.value("cryo_listening"), "before a client connects")

				e.dial()
				lines := e.log.count("WARN Cannot accept clients; retrying")
				require.Greater(t, lines, 5)
				require.Less(t, lines, 20, "at most one a second")
				e.log.want(t, errno.Error()+": ", c.hint)
				require.Zero(t, e.log.count("ERROR "))
				require.Equal(t, int64(20), e.metrics.value("cryo_listener_errors{kind="+c.kind+"}"))
				require.Zero(t, e.metrics.value("input_connection_lost"), "sessions are received from all the time")
			})
		})
	}
}

func TestListenerCanBeClosedDuringAShortage(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			l, err := listen(network, address)
			return &exhaustedListener{l, syscall.EMFILE, 1000}, err
		}
		p := e.run(listenInput, toProbe)
		time.Sleep(5 * time.Second)
		p.stop()
		require.Zero(t, e.metrics.value("cryo_listening"))
	})
}

// exhaustedListener lacks something for a number of times.
type exhaustedListener struct {
	net.Listener
	lacks syscall.Errno
	times int
}

func (l *exhaustedListener) Accept() (net.Conn, error) {
	if l.times > 0 {
		l.times--
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: l.lacks}
	}
	return l.Listener.Accept()
}

func TestHTTPServerErrorsAreLoggedAtTheRightLevel(t *testing.T) {
	book, panics := &logBook{}, 0
	log := serverLog(service.NewLoggerFromSlog(book.logger()), func() { panics++ })
	log.Print("http: panic serving 10.0.0.1:1: boom\ngoroutine 1 [running]:")
	log.Print("http: TLS handshake error from 10.0.0.1:1: EOF")
	book.want(t, "ERROR Panic in the handshake with a client")
	book.want(t, "DEBUG Malformed HTTP request or TLS handshake")
	require.Equal(t, 1, panics)
}
