package plugin

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestGracefulStopAcknowledgesNoIncompleteStream(t *testing.T) {
	atBothInputs(t, asLines, func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		st := open(t, peer, "growing")
		write(t, st, "one\nand a part")
		whole := sendStream(peer, "whole", "two\n")
		arrivals := e.want("one", "two")
		stopped := sendAny(func() error { p.stop(); return nil })
		stopped.wantPending(t, "lines are in the pipeline")
		whole.wantPending(t, "its line is in the pipeline")
		for _, a := range arrivals {
			a.deliver()
		}
		whole.wantAcked(t, "delivered before the end")
		begin := time.Now()
		stopped.wantAcked(t, "it waits for no more of the stream")
		require.Less(t, time.Since(begin), 10*time.Second)
		require.Error(t, st.Finish())
		e.wantNoArrival("the last line was not complete")
	})
}

func TestStopAcknowledgesNoStreamWithUndeliveredMessages(t *testing.T) {
	atBothInputs(t, "max_in_flight: 1, "+asLines, func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "log", "one\ntwo\nthree\n")
		waits := sendStream(peer, "other", "four\n")
		a := e.arrival()
		stopped := sendAny(func() error { p.stop(); return nil })
		stopped.wantPending(t, "a line is in the pipeline")
		a.deliver()
		for settled := false; !settled; {
			select {
			case err := <-stopped.done:
				require.NoError(t, err)
				settled = true
			case a := <-e.probe.arrivals:
				require.NotEqual(t, "three", a.texts()[0], "read after the stop")
				a.deliver()
			}
		}
		require.Error(t, stream.result(t))
		_ = waits.result(t) // its one line may have been the one
	})
}

func TestKilledInputAcknowledgesNoStream(t *testing.T) {
	atBothInputs(t, asLines, func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "log", "one\ntwo\n")
		e.want("one", "two")
		p.kill()
		require.Error(t, stream.result(t))
	})
}

func TestClosedInputCancelsItsStreamsAndKeepsTheSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const settings = "max_buffer_bytes: 100000"
		in := e.run(with(listenInput, settings+", max_batch_count: 1, streams: { max_open: 3, scanner: { lines: {} } }"), toProbe)
		e.run(fromOnce, with(listenOutput, settings))
		client := e.dial()
		growing := open(t, client, "growing")
		write(t, growing, "one\nand a part")
		waits := sendStream(client, "delivered in part", "two\n")
		e.want("one", "two")
		noSlot := sendStream(client, "waits for a slot", "three\n")
		noSlot.wantPending(t, "two are open, and one is for others")
		in.kill()
		waits.wantCancelled(t, "what is not delivered is not left to wait for ever")
		noSlot.wantCancelled(t, "and nobody will open this one")
		require.ErrorIs(t, growing.Finish(), cryo.ErrStreamCancelled)
		sendStream(client, "later", "four\n").wantCancelled(t, "for whom?")

		e.wantSends(t, client, "acknowledged")
		require.NoError(t, client.Err())

		e.run(with(listenInput, settings+", "+asLines), toProbe)
		stream := sendStream(client, "welcome", "five\n")
		e.want("five")[0].deliver()
		stream.wantAcked(t, "there is an input again")
	})
}

func TestStreamThatWaitsForASlotIsCancelledWhenItsInputCloses(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "streams: { max_open: 1, scanner: { lines: {} } }"), toProbe)
		e.run(fromOnce, listenOutput)
		one, other := e.dial(), e.dial()
		st := open(t, one, "open")
		waits := sendStream(other, "waits for a slot", "line\n")
		waits.wantPending(t, "another session's is open")
		in.stop()
		waits.wantCancelled(t, "nobody will open it")
		require.ErrorIs(t, st.Finish(), cryo.ErrStreamCancelled)

		e.run(with(listenInput, "streams: { max_open: 1, scanner: { lines: {} } }"), toProbe)
		again := sendStream(other, "again", "line\n")
		e.want("line")[0].deliver()
		again.wantAcked(t, "its session has a place")
	})
}

func TestFailedStreamsReleaseTheirSlotsAndMemory(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_buffer_bytes: 300000, auto_replay_nacks: false, max_batch_count: 1, streams: { max_open: 1, max_bytes: 200000, idle_timeout: 5s, scanner: { chunker: { size: 100000 } } }"), toProbe)
		s := e.dial()
		for i := range 12 {
			switch i % 4 {
			case 0: // rejected
				stream := sendStream(s, "rejected", string(make([]byte, 200_000)))
				first, second := e.arrival(), e.arrival()
				first.fail(errOutput)
				stream.wantCancelled(t, "rejected")
				second.deliver()
			case 1: // silent
				st := open(t, s, "silent")
				write(t, st, string(make([]byte, 150_000)))
				e.arrival().deliver()
				time.Sleep(6 * time.Second)
				synctest.Wait()
			case 2: // too long
				stream := sendStream(s, "too long", string(make([]byte, 210_000)))
				a, b := e.arrival(), (*arrival)(nil)
				a.deliver()
				synctest.Wait()
				select {
				case b = <-e.probe.arrivals:
					b.deliver()
				default:
				}
				stream.wantCancelled(t, "too long")
			case 3: // cut off
				st := open(t, s, "cut off")
				write(t, st, string(make([]byte, 150_000)))
				e.net.cut()
				e.arrival().deliver()
				synctest.Wait()
				s = e.dial()
			}
		}
		stream := sendStream(s, "good", string(make([]byte, 200_000)))
		e.arrival().deliver()
		e.arrival().deliver()
		stream.wantAcked(t, "delivered")
	})
}

func TestStreamsCancelledByAStopReleaseTheirMemory(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const buffer = "max_buffer_bytes: 300000"
		e.run(fromOnce, with(listenOutput, buffer))
		client := e.dial()
		for range 6 {
			in := e.run(with(listenInput, buffer+", streams: { scanner: { chunker: { size: 100000 } } }"), toProbe)
			write(t, open(t, client, "open"), string(make([]byte, 150_000)))
			e.arrival()
			in.kill()
		}
		e.run(with(listenInput, buffer), toProbe)
		m := send(client, string(make([]byte, 200_000)))
		e.arrival().deliver()
		m.wantAcked(t, "there is memory for it")
	})
}

func TestNewStreamsGoToTheRemainingInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		// The second limits its streams otherwise, which must then count.
		first := e.run(with(listenInput, asLines), toProbe)
		second := e.run(with(listenInput, "streams: { max_open: 1 }"), toProbe)
		client := e.dial() // the first's
		st := open(t, client, "in mid-stream")
		write(t, st, "one\ntw")
		e.want("one")[0].deliver()
		first.stop()
		require.ErrorIs(t, st.Finish(), cryo.ErrStreamCancelled)

		st = open(t, client, "open")
		waits := sendStream(client, "waits", "three\nfour\n")
		waits.wantPending(t, "one is open")
		require.NoError(t, sendAndFinish(st, "five\n", e))
		e.want("three\nfour\n")[0].deliver()
		waits.wantAcked(t, "delivered")
		second.stop()
	})
}

// sendAndFinish sends the rest of a stream that arrives as one message.
func sendAndFinish(st *cryo.OutgoingStream, content string, e *engine) error {
	if _, err := st.Write([]byte(content)); err != nil {
		return err
	}
	finish := sendAny(st.Finish)
	e.want(content)[0].deliver()
	return finish.result(e.t)
}

// The slot of a stream may be free at the moment in which the engine stops reading.
func TestDrainingInputStartsNoStream(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.bareServerInput("")
		defer func() { require.NoError(t, in.Close(context.Background())) }()
		require.NoError(t, in.Connect(t.Context()))
		e.dial()
		synctest.Wait()
		f := in.feeder.newFeed(&handover{session: in.listener.sessions()[0]})
		in.drain()
		require.False(t, f.acquireSlot())
		require.Zero(t, in.queue.streams.Used())
	})
}
