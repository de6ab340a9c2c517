package cryo_test

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// lines is a log.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// want wants one line since the last call, with all of the parts.
func (l *lines) want(t *testing.T, parts ...string) {
	t.Helper()
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.buf.String()
	l.buf.Reset()
	require.Equal(t, 1, strings.Count(text, "\n"), "lines: %s", text)
	for _, part := range parts {
		require.Contains(t, text, part)
	}
}

func (l *lines) wantNone(t *testing.T) {
	t.Helper()
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	require.Empty(t, l.buf.String())
}

// The published client for browsers sends ENDPOINT_INFO on its first connection only.
func TestClientThatAcknowledgesEndpointInfoHasASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{})
		peer := join(t, l, sid)
		info := peer.WantType("the server's ENDPOINT_INFO", wire.EndpointInfo)
		require.Empty(t, sessions)
		peer.Ack(info)
		s := next(t, sessions)
		peer.WantIdle("ENDPOINT_INFO again", time.Second)

		sent := start(func() error { return s.SendText(t.Context(), "welcome back") })
		peer.Ack(peer.WantType("the text", wire.UTF8))
		sent.wantSuccess(t)
		peer.WriteFrames(cryotest.Text(7, "hello again"))
		require.NoError(t, receive(t, s).Ack())
		peer.WantFrame("its acknowledgement", cryotest.Acked(7))
	})
}

func TestFirstDataOfAClientCompletesTheHandshake(t *testing.T) {
	for name, f := range map[string]wire.Frame{
		"UTF8DATA":   cryotest.Text(1, "early"),
		"BINARYDATA": cryotest.Binary(1, "early"),
		"TX_START":   txStart(1, 0, -1, "early"),
		"TX_CHUNK":   txChunk(0, 0, "of no stream"),
		"TX_FINISH":  txFinish(1, 0),
		"TX_FLOW":    txFlow(1, wire.FlowPush),
		"TX_FETCH":   txFetch(1, 0, 0, 1),
		"TX_CANCEL":  txCancel(1, 0),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
				peer := join(t, l, sid)
				peer.Read()
				begin := time.Now()
				peer.WriteFrames(f)
				s := next(t, sessions)
				require.Zero(t, time.Since(begin))
				synctest.Wait()
				require.Contains(t, types(peer.Taken()), wire.EndpointInfo, "the server's, at once")
				switch f.Type {
				case wire.UTF8, wire.Binary:
					require.Equal(t, "early", string(receive(t, s).Payload))
				case wire.TxStart:
					require.Equal(t, "early", acceptStream(t, s).Name())
				}
			})
		})
	}
}

// The acknowledgement of the server's ENDPOINT_INFO is behind the data then.
func TestDataThatIsReadLateCompletesTheHandshake(t *testing.T) {
	const size = 20_000
	for name, opts := range map[string]cryo.SessionOptions{
		"exceeds a rate":     {MaxBytesPerSecond: 1000},
		"waits for capacity": {MaxBufferBytes: 1000},
		"arrives piecemeal":  {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opts.HeartbeatInterval = time.Hour
				_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: opts})
				first := join(t, l, 1)
				first.ClientHandshake()
				holder := next(t, sessions)
				first.WriteFrames(cryotest.Binary(1, string(make([]byte, 1000))))
				held := receive(t, holder)

				peer := join(t, l, sid)
				peer.Read()
				b := bytesOf(t, peer, cryotest.Binary(1, string(make([]byte, size))))
				sends(t, peer, b[:size/2])
				synctest.Wait()
				s := next(t, sessions)
				time.Sleep(time.Minute)
				require.NoError(t, held.Ack())
				sends(t, peer, b[size/2:])
				require.Len(t, receive(t, s).Payload, size)
			})
		})
	}
}

func types(frames []wire.Frame) (types []wire.Type) {
	for _, f := range frames {
		types = append(types, f.Type)
	}
	return types
}

// Streams go both ways, though it is not known whether the client supports them.
func TestClientWithoutEndpointInfoHasStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		peer := join(t, l, sid)
		peer.WriteFrames(txStart(1, 4, -1, "from it"))
		s := next(t, sessions)
		peer.WantEndpointInfo("the server's ENDPOINT_INFO")
		st := acceptStream(t, s)
		read := start(func() error { return wantRest(t, st, "abc") })
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
		peer.WriteFrames(txChunk(4, 0, "abc"), txFinish(2, 4))
		read.wantSuccess(t)
		require.NoError(t, st.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))

		sent := start(func() error { return s.SendStream(t.Context(), strings.NewReader("xyz"), nil) })
		peer.Ack(peer.WantType("TX_START", wire.TxStart))
		require.Equal(t, "xyz", string(peer.WantType("TX_CHUNK", wire.TxChunk).Payload))
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		sent.wantSuccess(t)
	})
}

func TestMissedHandshakeIsLoggedAndCounted(t *testing.T) {
	for name, frames := range map[string][]wire.Frame{
		"nothing":                       nil,
		"a pong":                        {cryotest.Pong(1)},
		"an acknowledgement of nothing": {cryotest.Acked(1)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log lines
				denied := make(chan int, 1)
				_, l, sessions := serve(t, cryo.ServerOptions{
					SessionOptions:   cryo.SessionOptions{Logger: log.logger()},
					HandshakeTimeout: 3 * time.Second,
					OnDeny:           func(status int) { denied <- status },
				})
				peer := join(t, l, sid)
				peer.WriteFrames(frames...)
				peer.WantEndpointInfo("the server's ENDPOINT_INFO")
				peer.WantClose("the end", 4001, "protocol violation: no ENDPOINT_INFO, ACK or data received within 3s")
				require.Equal(t, 408, next(t, denied))
				require.Empty(t, sessions)
				log.want(t, "level=WARN", "A client did not complete the Cryo handshake", "remote=", "session=18446744073709551574",
					"missing=\"ENDPOINT_INFO, an acknowledgement, or data\"", "timeout=3s")
			})
		})
	}
}

func TestUnknownFramesAreIgnoredAndCounted(t *testing.T) {
	var ignored []*cryo.Session
	opts := quiet
	opts.OnIgnore = func(s *cryo.Session) { ignored = append(ignored, s) }
	atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		for _, size := range []int{0, 4, 1 << 20, wire.MaxPayload} {
			f := bytesOf(t, peer, wire.Frame{SID: sid, Type: wire.Binary, Payload: make([]byte, size)})
			frame := f[len(f)-wire.AckHeaderSize-size:]
			frame[8] = 77
			peer.WriteBytes(frame)
		}
		peer.WriteFrames(cryotest.Text(1, "behind them"))
		require.NoError(t, receive(t, s).Ack())
		peer.WantFrame("the only answer", cryotest.Acked(1))
		peer.WantIdle("another", time.Second)
		require.EqualValues(t, 4, s.Stats().IgnoredFrames)
		require.Equal(t, []*cryo.Session{s, s, s, s}, ignored)
		ignored = nil
		require.NoError(t, s.Err())
	})
}

// Older clients send all of a stream without waiting for an acknowledgement.
func TestChunksMayFollowTxStartAtOnce(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 5, -1, ""), txChunk(5, 0, "ab"), txChunk(5, 1, "c"), txFinish(2, 5), cryotest.Text(3, "behind it"))
		st := acceptStream(t, s)
		time.Sleep(900 * time.Millisecond)
		require.True(t, s.Stats().Paused)
		require.Zero(t, s.Held(), "nothing is received before it is accepted")
		read := start(func() error { return wantRest(t, st, "abc") })
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
		read.wantSuccess(t)
		require.NoError(t, st.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
		require.NoError(t, receive(t, s).Ack())
		require.False(t, s.Stats().Paused)
	})
}

func TestStreamThatIsNotAcceptedInTimeIsCancelledAtItsFirstChunk(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		begin := time.Now()
		peer.WriteFrames(txStart(1, 5, -1, ""), txChunk(5, 0, "ab"), txChunk(5, 1, "c"), txFinish(2, 5), cryotest.Text(3, "behind it"))
		require.Equal(t, "behind it", string(receive(t, s).Payload))
		require.Equal(t, time.Second, time.Since(begin))
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 5))
		peer.WantIdle("an acknowledgement", time.Minute)
		wantNoStream(t, s)
	})
}

// A hostile client costs itself a second, and a third of the time after that.
func TestStreamsOfASessionShareTheTimeToBeAccepted(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		begin := time.Now()
		for tx := range uint32(200) {
			peer.WriteFrames(txStart(2*tx, tx, -1, ""), txChunk(tx, 0, "ab"))
		}
		peer.WriteFrames(cryotest.Text(1000, "behind them"))
		require.Equal(t, "behind them", string(receive(t, s).Payload))
		require.Equal(t, time.Second, time.Since(begin), "for all of them")
		for tx := range uint32(200) {
			peer.WantFrame("TX_CANCEL", txCancel(end.first+tx, tx))
		}

		time.Sleep(time.Second)
		begin = time.Now()
		peer.WriteFrames(txStart(1001, 300, -1, ""), txChunk(300, 0, "ab"), cryotest.Text(1002, "behind it"))
		require.Equal(t, "behind it", string(receive(t, s).Payload))
		require.Equal(t, 500*time.Millisecond, time.Since(begin), "half of the second that has passed")

		var paused time.Duration
		begin = time.Now()
		for tx := uint32(1000); time.Since(begin) < time.Minute; tx++ {
			time.Sleep(100 * time.Millisecond)
			early := time.Now()
			peer.WriteFrames(txStart(2*tx, tx, -1, ""), txChunk(tx, 0, "ab"), cryotest.Text(2*tx+1, "behind it"))
			require.Equal(t, "behind it", string(receive(t, s).Payload))
			paused += time.Since(early)
		}
		require.Equal(t, time.Since(begin)/3, paused)

		time.Sleep(time.Minute)
		peer.Skip()
		peer.WriteFrames(txStart(1003, 301, -1, ""), txChunk(301, 0, "ab"), txFinish(1004, 301))
		time.Sleep(900 * time.Millisecond)
		require.NoError(t, wantRest(t, acceptStream(t, s), "ab"), "a whole second again")
	})
}

func TestWaitForAStreamToBeAcceptedEndsWithTheStreamOrSession(t *testing.T) {
	for name, finish := range map[string]func(t *testing.T, s *cryo.Session, st *cryo.IncomingStream){
		"the stream is closed": func(t *testing.T, _ *cryo.Session, st *cryo.IncomingStream) { require.NoError(t, st.Close()) },
		"the session ends": func(t *testing.T, s *cryo.Session, _ *cryo.IncomingStream) {
			start(func() error { return s.Close(t.Context(), "") })
		},
		"the connection is closed": func(t *testing.T, s *cryo.Session, _ *cryo.IncomingStream) { require.NoError(t, s.CloseNow()) },
		"the session receives no longer": func(t *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			require.NoError(t, st.Close())
			s.SetSendOnly(true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteFrames(txStart(1, 5, -1, ""), txChunk(5, 0, "ab"))
				st := acceptStream(t, s)
				synctest.Wait()
				require.True(t, s.Stats().Paused)
				begin := time.Now()
				finish(t, s, st)
				synctest.Wait()
				require.False(t, s.Stats().Paused)
				require.Zero(t, time.Since(begin))
			})
		})
	}
}

func TestTooLongStreamNameIsLogged(t *testing.T) {
	var log lines
	opts := quiet
	opts.Logger = log.logger()
	atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 5, -1, strings.Repeat("x", 1025)))
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 5))
		log.want(t, "level=WARN", "Rejecting a stream: its name is too long", "session=18446744073709551574", "limit_bytes=1024")
	})
}

func TestViolationIsLoggedOnce(t *testing.T) {
	var log lines
	opts := quiet
	opts.Logger = log.logger()
	atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteBytes([]byte("half"))
		peer.WriteBytes([]byte("half"))
		peer.WantClose("the end", 4001, "protocol violation: malformed frame of 4 bytes: shorter than session id and type")
		log.want(t, "level=WARN", "Closing a session because of a protocol violation", "session=18446744073709551574", "shorter than session id and type")
		_ = peer.WS.Close()
		wantEnded(t, s)
		log.wantNone(t)
	})
}

func TestViolationsAtAServerAreLoggedOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lines
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{Logger: log.logger()}})
		violate := func() {
			peer := join(t, l, sid)
			peer.ClientHandshake()
			next(t, sessions)
			peer.WriteBytes([]byte("half"))
			peer.WantClose("the end", 4001, "protocol violation: malformed frame of 4 bytes: shorter than session id and type")
			require.NoError(t, peer.WS.Close())
			synctest.Wait()
		}
		violate()
		log.want(t, "suppressed=0")
		violate()
		violate()
		log.wantNone(t)
		time.Sleep(time.Second)
		violate()
		log.want(t, "suppressed=2")
	})
}

// cryo-server does not survive the end of its session while it sends a stream.
func TestViolationCancelsStreamsBeforeTheCloseFrame(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 5)
		peer.WriteFrames(txChunk(5, 1, "abc"))
		peer.WriteBytes([]byte("half"))
		cancel := peer.WantType("the stream is cancelled", wire.TxCancel)
		peer.WriteFrames(txChunk(5, 2, "def"), cryotest.Text(9, "too late"))
		peer.WantIdle("the close frame waits", instant)
		peer.Ack(cancel)
		peer.WantClose("the end", 4001, "protocol violation: malformed frame of 4 bytes: shorter than session id and type")
		_ = peer.WS.Close()
		wantEnded(t, s)
		require.ErrorContains(t, wantRest(t, st, "abc"), "unexpected EOF after 4 bytes")
		_, err := s.Receive(t.Context())
		require.Equal(t, s.Err(), err, "what came after the violation is not received")
	})
}

// cryo-server acknowledges TX_CANCEL while a last chunk may still wait.
func TestByeWaitsForTheLastFramesOfCancelledStreams(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.Ack(peer.WantType("the stream is cancelled", wire.TxCancel))
		peer.WantIdle("BYE", 490*time.Millisecond)
		peer.WriteFrames(txChunk(5, 1, "the last"))
		peer.WantIdle("BYE", 490*time.Millisecond)
		begin := time.Now()
		peer.WantType("BYE", wire.Bye)
		require.LessOrEqual(t, time.Since(begin), 10*time.Millisecond)
		peer.WantClose("the end", 4000, "")
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
	})
}

// Not every peer stops when its stream is cancelled.
func TestByeWaitsNoLongerThanHalfOfTheCloseTimeoutForChunks(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		begin := time.Now()
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.Ack(peer.WantType("the stream is cancelled", wire.TxCancel))
		for i := range uint32(50) {
			peer.WriteFrames(txChunk(5, 1+i, "more"))
			time.Sleep(50 * time.Millisecond)
		}
		peer.WantType("BYE", wire.Bye)
		require.Equal(t, cryo.DefaultCloseTimeout/2, time.Since(begin))
		peer.WantClose("the end", 4000, "")
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
	})
}

func TestCloseFrameOfAViolationWaitsForNoLongerThanHalfOfTheCloseTimeout(t *testing.T) {
	opts := quiet
	opts.CloseTimeout = 4 * time.Second
	atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		begin := time.Now()
		peer.WriteBytes([]byte("half"))
		peer.WantType("the stream is cancelled", wire.TxCancel)
		peer.WantClose("the end", 4001, "protocol violation: malformed frame of 4 bytes: shorter than session id and type")
		require.Equal(t, 2*time.Second, time.Since(begin))
		wantEnded(t, s)
		require.Equal(t, 4*time.Second, time.Since(begin))
	})
}

func TestTakenOverSessionCancelsStreamsBeforeTheCloseFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		old := join(t, l, sid)
		old.ClientHandshake()
		lost := next(t, sessions)
		incoming(t, lost, old, 1, 5)
		join(t, l, sid).ClientHandshake()
		next(t, sessions)
		cancel := old.WantType("the stream is cancelled", wire.TxCancel)
		old.WantIdle("the close frame waits", instant)
		old.Ack(cancel)
		old.WantClose("the end", 4000, "taken over by a newer connection of the same client")
		require.ErrorIs(t, lost.Err(), cryo.ErrTakenOver)
	})
}

// The published client for browsers connects again after any code but 4000.
func TestCloseForRetrySendsACodeAfterWhichClientsReconnect(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		closing := start(func() error { return s.CloseForRetry(t.Context(), "late") })
		peer.Ack(peer.WantType("the stream is cancelled", wire.TxCancel))
		peer.WantClose("the end, without BYE", 1013, "late")
		peer.WriteClose(1013, "")
		closing.wantSuccess(t)
		require.ErrorIs(t, s.Err(), cryo.ErrClosed)
	})
}

func TestDrainOfAServerSendsACodeAfterWhichClientsReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		peer := join(t, l, sid)
		peer.ClientHandshake()
		next(t, sessions)
		drained := start(func() error { return server.Drain(t.Context()) })
		peer.WantClose("the end, without BYE", 1012, "server is shutting down")
		peer.WriteClose(1012, "")
		drained.wantSuccess(t)
	})
}

// Not every peer stops when its stream is cancelled.
func TestTakenOverSessionSendsTheCloseFrameDespiteOpenStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		old := join(t, l, sid)
		old.ClientHandshake()
		lost := next(t, sessions)
		incoming(t, lost, old, 1, 5)
		begin := time.Now()
		join(t, l, sid).ClientHandshake()
		next(t, sessions)
		old.WantType("the stream is cancelled", wire.TxCancel)
		old.WantClose("the end", 4000, "taken over by a newer connection of the same client")
		require.Equal(t, 500*time.Millisecond, time.Since(begin))
		wantEnded(t, lost)
		require.Equal(t, time.Second, time.Since(begin))
	})
}

func TestSecondViolationDoesNotShortenTheWaitForCancels(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		peer.WriteBytes([]byte("half"))
		cancel := peer.WantType("the stream is cancelled", wire.TxCancel)
		peer.WriteBytes([]byte("third"))
		peer.WantIdle("the close frame waits", 100*time.Millisecond)
		peer.Ack(cancel)
		peer.WantClose("the end", 4001, "protocol violation: malformed frame of 4 bytes: shorter than session id and type")
	})
}

func TestViolationDuringCloseDoesNotShortenTheWaitForCancels(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		closing := start(func() error { return s.Close(t.Context(), "") })
		cancel := peer.WantType("the stream is cancelled", wire.TxCancel)
		peer.WriteBytes([]byte("half"))
		peer.WantIdle("BYE waits", 100*time.Millisecond)
		peer.Ack(cancel)
		peer.WantType("BYE", wire.Bye)
		peer.WantClose("the end", 4000, "")
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
	})
}

// A sender may open the next stream as soon as one is rejected, for as long as the session is open.
func TestByeDoesNotWaitForStreamsThatAreRejectedAtOnce(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 5)
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.Ack(peer.WantType("the stream is cancelled", wire.TxCancel))
		begin := time.Now()
		for i := range uint32(4) {
			time.Sleep(100 * time.Millisecond)
			peer.WriteFrames(txStart(2+i, 6+i, -1, "another"))
			peer.Ack(peer.WantType("it is rejected", wire.TxCancel))
		}
		peer.WantType("BYE", wire.Bye)
		require.Equal(t, 500*time.Millisecond, time.Since(begin))
		peer.WantClose("the end", 4000, "")
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
	})
}
