package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// An output that hangs, in front of a server that ends sessions without pongs.

// published is a server that pings, and ends a session that sent no pong between
// two pings, as cryo-server does. It sends its messages behind some first pings,
// without a look at what is acknowledged.
type published struct {
	interval time.Duration
	messages int
	size     int

	clients atomic.Int32
	written atomic.Int32 // messages, to all clients
	acked   atomic.Int32
	ended   chan error // nil when all messages of a client are acknowledged
}

var errNoPong = errors.New("no pong between two pings")

func (p *published) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ws, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
	if err != nil {
		return
	}
	p.clients.Add(1)
	var sid uint64
	_, _ = fmt.Sscan(r.URL.Query().Get("x-cryo-sid"), &sid)
	p.ended <- p.play(ws, sid)
}

func (p *published) play(ws *websocket.Conn, sid uint64) error {
	var playing sync.WaitGroup
	defer playing.Wait()
	defer ws.Close()
	say := func(f wire.Frame) error {
		f.SID = sid
		b, err := wire.Append(nil, &f)
		if err != nil {
			return err
		}
		return ws.WriteMessage(websocket.BinaryMessage, b)
	}
	if err := say(cryotest.EndpointInfo(0)); err != nil {
		return err
	}
	for info := false; !info; {
		_, b, err := ws.ReadMessage()
		if err != nil {
			return err
		}
		f, err := wire.Parse(b)
		if err != nil {
			return err
		}
		if info = f.Type == wire.EndpointInfo; info { // or its ACK of ours
			if err := say(cryotest.Acked(f.Ack)); err != nil {
				return err
			}
		}
	}

	const early = 2 // pings before the messages
	pings, stop := make(chan uint32, 1000), make(chan struct{})
	defer close(stop)
	playing.Go(func() { // the one who writes; what is not taken waits, also pings
		var err error
		for number := range pings {
			if err = say(cryotest.Ping(number)); err != nil || number != early {
				continue
			}
			for i := 0; i < p.messages && err == nil; i++ {
				err = say(cryotest.Binary(uint32(i), strings.Repeat("x", p.size)))
				p.written.Add(1)
			}
		}
	})
	var alive atomic.Bool
	alive.Store(true)
	silent := make(chan struct{})
	playing.Go(func() {
		defer close(pings)
		tick := time.NewTimer(p.interval) // no ticker, whose late ticks are soon followed by others
		defer tick.Stop()
		for number := uint32(1); ; number++ {
			select {
			case <-stop:
				return
			case <-tick.C:
				tick.Reset(p.interval)
			}
			if !alive.Swap(false) {
				close(silent)
				_ = ws.Close()
				<-stop
				return
			}
			pings <- number
		}
	})
	for acked := 0; acked < p.messages; {
		_, b, err := ws.ReadMessage()
		if err != nil {
			select {
			case <-silent:
				return errNoPong
			default:
				return err
			}
		}
		f, err := wire.Parse(b)
		switch {
		case err != nil:
			return err
		case f.Type == wire.PingPong:
			alive.Store(true)
		case f.Type == wire.Ack && p.written.Load() > 0:
			acked++
			p.acked.Add(1)
		}
	}
	return nil
}

// goOn delivers all messages, and wants the server to see each acknowledged on
// its one and only session.
func (p *published) goOn(t *testing.T, e *engine) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- <-p.ended }()
	for done := false; !done; {
		select {
		case a := <-e.probe.arrivals:
			a.deliver()
		case err := <-ended:
			require.NoError(t, err)
			done = true
		}
	}
	require.EqualValues(t, p.messages, p.acked.Load())
	require.EqualValues(t, 1, p.clients.Load(), "the session was never lost")
}

const stallBound = "max_buffer_bytes: 1048576, max_in_flight: 1"

func TestHangingOutputDoesNotEndTheSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := &published{interval: 15 * time.Second, messages: 100, size: 64 << 10, ended: make(chan error, 10)}
		e.serveHTTP(somewhere, p)
		e.run(with(dialInput, stallBound), toProbe)
		a := e.arrival()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		// The bound, one more, and what fills the buffers of both ends.
		require.LessOrEqual(t, p.written.Load(), int32(16+3), "reading pauses at max_buffer_bytes")
		select {
		case err := <-p.ended:
			require.NoError(t, err, "the session lives")
		default:
		}
		require.Zero(t, e.log.count("Disconnected"))
		a.deliver()
		p.goOn(t, e)
	})
}

// The same in real time and over real sockets, for as long as two minutes if
// CRYO_LONG_TESTS is set, and for many missed pings if not.
func TestHangingOutputDoesNotEndTheSessionOverRealSockets(t *testing.T) {
	defer checkLeaks(t)
	interval, stall := 2*time.Second, 8*time.Second
	if os.Getenv("CRYO_LONG_TESTS") != "" {
		interval, stall = 5*time.Second, 2*time.Minute
	}
	p := &published{interval: interval, messages: 2000, size: 64 << 10, ended: make(chan error, 10)}
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := &http.Server{Handler: p, ReadHeaderTimeout: time.Minute, ErrorLog: quiet}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(socket) })
	defer serving.Wait()
	defer server.Close()

	e := newEngine(t)
	e.dialer = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, socket.Addr().String())
	}
	pipe := e.start(with(dialInput, stallBound+", connect_timeout: 1m"), toProbe)
	defer pipe.stop()
	before := heapInUse()
	var a *arrival
	select {
	case a = <-e.probe.arrivals:
	case err := <-p.ended:
		require.NoError(t, err, "the session was lost")
	}
	select { // not a wait for something: this is the stall
	case err := <-p.ended:
		require.NoError(t, err, "the session was lost")
	case <-time.After(stall):
	}
	require.Less(t, heapInUse()-before, int64(16<<20), "memory stays bounded, of 125 MiB")
	require.Less(t, p.acked.Load(), int32(10))
	a.deliver()
	p.goOn(t, e)
}

// heap is what is in use, without what pools keep.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

const (
	stallLine     = "WARN Pipeline stalled"
	slowLine      = "WARN A message has been in flight for a long time"
	recoveredLine = "INFO Delayed messages are no longer in flight"
)

func TestBatchThatNeverFillsIsReportedOnce(t *testing.T) {
	for name, c := range map[string]struct {
		fields, policy string
		size           int
	}{
		"count above max_in_flight":        {"max_in_flight: 10", "count: 11", 10},
		"byte_size above max_buffer_bytes": {"max_buffer_bytes: 10000", "byte_size: 20000", 1000},
	} {
		t.Run(name, func(t *testing.T) {
			atBothInputsTo(t, c.fields, "probe: { batching: { "+c.policy+" } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
				for i := range 30 {
					_ = send(peer, fmt.Sprintf("%0*d", c.size, i))
				}
				time.Sleep(stallTimeout - time.Second)
				e.wantNoArrival("no batch is full")
				require.Zero(t, e.log.count(stallLine))
				time.Sleep(time.Hour)
				require.Equal(t, 1, e.log.count(stallLine), "once: %s", strings.Join(e.log.all(), "\n"))
				e.log.want(t, "lower its count or byte_size, or set a period")
			})
		})
	}
}

func TestHangingOutputIsReportedOnce(t *testing.T) {
	atBothInputsTo(t, "max_in_flight: 10", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		for i := range 30 {
			_ = send(peer, fmt.Sprint(i))
		}
		time.Sleep(stallTimeout - time.Second)
		require.Zero(t, e.log.count(stallLine))
		time.Sleep(time.Hour)
		fields := []string{"in_flight=10", "idle=10s", "max_in_flight=10"}
		if strings.HasSuffix(t.Name(), "cryo_server") {
			fields = []string{"in_flight=8", "idle=10s", "max_in_flight=10", "client_quota=8"}
		}
		require.Equal(t, 1, e.log.count(append(fields, stallLine)...))
		require.Equal(t, 1, e.log.count(stallLine))
		require.Zero(t, e.log.count(slowLine), "the same stall")
	})
}

// The engine asks for no more messages then.
func TestOutputThatHangsWithOneMessageIsReportedUnderBackpressure(t *testing.T) {
	atBothInputsTo(t, "max_buffer_bytes: 10000, max_batch_count: 1", toSerial, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		one := send(peer, "one")
		hangs := e.arrival()
		time.Sleep(time.Hour)
		require.Zero(t, e.log.count(stallLine), "there is room for more")
		for i := range 30 {
			_ = send(peer, fmt.Sprintf("%01000d", i))
		}
		time.Sleep(2 * stallTimeout)
		require.Equal(t, 1, e.log.count(stallLine), strings.Join(e.log.all(), "\n"))
		hangs.deliver()
		one.wantAcked(t, "delivered after all")
	})
}

func TestVerySlowOutputIsReportedOncePerStall(t *testing.T) {
	atBothInputsTo(t, "max_buffer_bytes: 10000, max_batch_count: 1", toSerial, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		time.Sleep(stallTimeout / 20) // between two looks: at a delivery there is room for a moment
		for range 2 {
			var all []*sending
			for i := range 30 {
				all = append(all, send(peer, fmt.Sprintf("%01000d", i)))
			}
			before := e.log.count(stallLine)
			for range 15 {
				time.Sleep(4 * stallTimeout)
				e.arrival().deliver()
			}
			require.Equal(t, before+1, e.log.count(stallLine), strings.Join(e.log.all(), "\n"))
			for range 15 {
				e.arrival().deliver()
			}
			wantAllAcked(t, all, "delivered in the end")
			time.Sleep(time.Minute) // of room
		}
	})
}

func TestBatchWithAPeriodIsNotReportedAsStalled(t *testing.T) {
	atBothInputsTo(t, "max_in_flight: 10", "probe: { batching: { count: 11, period: 5s } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		for i := range 30 {
			_ = send(peer, fmt.Sprint(i))
		}
		e.deliverNext(30)
		time.Sleep(time.Hour) // of nothing to do
		synctest.Wait()
		require.Zero(t, e.log.count(stallLine))
	})
}

// Few messages, so that no limit is reached.

func TestMessageInFlightForAMinuteIsReportedOnce(t *testing.T) {
	atBothInputsTo(t, "", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		m := send(peer, "hello")
		a := e.arrival()
		number, _ := a.batch[0].MetaGet("cryo_ack_id")
		time.Sleep(minSlowTimeout - time.Second)
		require.Zero(t, e.log.count(slowLine))
		time.Sleep(time.Hour)
		e.log.want(t, slowLine, fmt.Sprintf("session=%d", peer.ID()), "ack_id="+number, "age=1m", "in_flight=1")
		require.Equal(t, 1, e.log.count(slowLine), strings.Join(e.log.all(), "\n"))
		require.Zero(t, e.log.count("hello"), "no content is logged")
		require.Zero(t, e.log.count(stallLine), "the input can receive more")
		require.Zero(t, e.log.count(recoveredLine))
		a.deliver()
		m.wantAcked(t, "delivered after all")
		time.Sleep(time.Minute)
		require.Equal(t, 1, e.log.count(recoveredLine))
		e.log.want(t, recoveredLine, "lasted=1h0m", "in_flight=0")
	})
}

func TestBatchThatNeverFillsIsReportedBelowMaxInFlight(t *testing.T) {
	atBothInputsTo(t, "", "probe: { batching: { count: 10 } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sent := sendAll(peer, numbered("m%d", 9)...)
		time.Sleep(time.Hour)
		e.wantNoArrival("the batch is not full")
		require.Equal(t, 1, e.log.count(slowLine, "in_flight=9"), strings.Join(e.log.all(), "\n"))
		e.log.want(t, "set batching.period")
		sent = append(sent, send(peer, "the last"))
		e.arrival().deliver()
		wantAllAcked(t, sent, "delivered")
	})
}

func TestOneMessageThatHangsIsReportedWhileOthersAreDelivered(t *testing.T) {
	atBothInputsTo(t, "", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		send(peer, "hangs")
		hangs := e.arrival()
		for range 60 {
			m := send(peer, "another")
			e.arrival().deliver()
			m.wantAcked(t, "delivered")
			time.Sleep(time.Minute)
		}
		require.Equal(t, 1, e.log.count(slowLine), strings.Join(e.log.all(), "\n"))
		hangs.deliver()
	})
}

// An output that waits for some minutes by design: see minSlowTimeout.
func TestBatchesOfSomeMinutesAreReportedAFewTimes(t *testing.T) {
	atBothInputsTo(t, "", "probe: { batching: { count: 1000, period: 5m } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		delivered := e.deliverAll()
		for range 24 * 60 {
			send(peer, "one a minute")
			time.Sleep(time.Minute)
		}
		require.Greater(t, len(delivered()), 23*60)
		require.Equal(t, 3, e.log.count(slowLine), "after one minute, two and four")
		require.Equal(t, 3, e.log.count(recoveredLine))
	})
}

func TestEveryHangOfMoreThanAnHourIsReported(t *testing.T) {
	atBothInputsTo(t, "", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		const hangs = 20
		for range hangs {
			m := send(peer, "hangs")
			a := e.arrival()
			time.Sleep(maxSlowTimeout + time.Minute)
			a.deliver()
			m.wantAcked(t, "delivered after all")
			time.Sleep(time.Minute)
		}
		require.Equal(t, hangs, e.log.count(slowLine))
		require.Equal(t, hangs, e.log.count(recoveredLine))
	})
}

// What waits in front of the pipeline is not what the pipeline keeps.
func TestMessagesThatWaitForMaxInFlightAreNotReported(t *testing.T) {
	atBothInputsTo(t, "max_in_flight: 1", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		var sent []*sending
		for i := range 30 {
			sent = append(sent, send(peer, fmt.Sprint(i)))
		}
		for range sent {
			a := e.arrival()
			time.Sleep(9 * time.Second)
			a.deliver()
		}
		wantAllAcked(t, sent, "delivered within some minutes")
		require.Zero(t, e.log.count(slowLine), strings.Join(e.log.all(), "\n"))
	})
}

func TestMessageThatFailsAgainAndAgainIsReportedOnlyAsFailing(t *testing.T) {
	atBothInputsTo(t, "", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		send(peer, "poison")
		require.Empty(t, e.deliverFor(time.Hour, "poison"))
		e.log.want(t, "WARN A message has failed repeatedly", fmt.Sprintf("session=%d", peer.ID()), "ack_id=", "failures=")
		require.Zero(t, e.log.count(slowLine), strings.Join(e.log.all(), "\n"))
		hangs := e.arrival()
		time.Sleep(2 * minSlowTimeout)
		require.Equal(t, 1, e.log.count(slowLine), "this delivery hangs")
		hangs.deliver()
	})
}

func TestStreamThatTakesLongIsNotReported(t *testing.T) {
	const name = "stream of " + token
	atBothInputsTo(t, "streams: { scanner: { lines: {} }, idle_timeout: 5m }", toProbe, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		st := open(t, peer, name)
		for range 60 {
			time.Sleep(time.Minute)
			write(t, st, "one\n")
			require.Equal(t, []string{"one"}, e.deliverNext(1))
		}
		require.Zero(t, e.log.count(slowLine), strings.Join(e.log.all(), "\n"))
		write(t, st, "two\n")
		hangs := e.arrival()
		tx, _ := hangs.batch[0].MetaGet("cryo_tx_id")
		time.Sleep(2 * minSlowTimeout)
		logged := "(redacted: " // it could be the server's way to repeat the token that it was sent
		if strings.HasSuffix(t.Name(), "cryo_server") {
			logged = name // a client's own
		}
		e.log.want(t, slowLine, fmt.Sprintf("session=%d", peer.ID()), "stream="+logged, "tx_id="+tx)
		require.Zero(t, e.log.count("two"), "no content is logged")
		hangs.deliver()
	})
}

// The pipeline has delivered the message.
func TestMessageWhoseResponseIsAwaitedIsNotReported(t *testing.T) {
	atBothInputsTo(t, "ack_timeout: 1h", "sync_response: {}", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		m := send(peer, "question")
		response := receive(t, peer)
		time.Sleep(30 * time.Minute)
		m.wantPending(t, "the response is not acknowledged")
		require.Zero(t, e.log.count(slowLine), strings.Join(e.log.all(), "\n"))
		require.NoError(t, response.Ack())
		m.wantAcked(t, "the response is acknowledged")
	})
}
