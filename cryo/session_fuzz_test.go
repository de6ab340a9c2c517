package cryo_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// What a peer does in FuzzSession: a byte, the length of what follows in another,
// and that.
const (
	fuzzFrame = iota // the rest of a frame behind the session's id
	fuzzMessage
	fuzzText
	fuzzRaw
	fuzzPause
	fuzzSteps
)

// FuzzSession plays a peer that sends anything: the session serves it or ends,
// in good time and with its own error, and nothing panics or hangs.
func FuzzSession(f *testing.F) {
	add := func(script []byte) {
		f.Add(false, script)
		f.Add(true, script)
	}
	valid, malformed := cryotest.Vectors(f)
	var all []byte
	for _, v := range valid {
		frame := v.Bytes[8:]
		if len(frame) > 255 {
			continue
		}
		step := append([]byte{fuzzFrame, byte(len(frame))}, frame...)
		add(step)
		all = append(all, step...)
	}
	add(all)
	for _, m := range malformed {
		if len(m.Bytes) <= 255 {
			add(append([]byte{fuzzMessage, byte(len(m.Bytes))}, m.Bytes...))
		}
	}
	add([]byte{fuzzRaw, 2, 0x88, 0x80, fuzzText, 1, 'x', fuzzPause, 255})
	add([]byte{fuzzFrame, 7, 252, 0x40, 0, 0, 1, 'n', 'o', fuzzFrame, 5, 253, 0x40, 0, 0, 2})

	f.Fuzz(func(t *testing.T, listening bool, script []byte) {
		synctest.Test(t, func(t *testing.T) {
			opts := cryo.SessionOptions{MaxBufferBytes: 10_000}
			var (
				s    *cryo.Session
				peer *cryotest.Peer
			)
			if listening {
				s, peer = accepted(t, cryo.ServerOptions{SessionOptions: opts})
			} else {
				s, peer = dialled(t, cryo.DialOptions{SessionOptions: opts})
			}
			receiving := start(func() error { return settleAll(s) })
			sending := start(func() error { return s.SendBatch(t.Context(), texts("a", "b", "c")) })
			play(peer, script)
			synctest.Wait()
			_ = peer.WS.Close()

			select {
			case <-s.Done():
			case <-time.After(time.Minute):
				require.FailNow(t, "the session does not end")
			}
			require.ErrorIs(t, s.Err(), net.ErrClosed)
			require.ErrorIs(t, receiving.result(t), net.ErrClosed)
			if err := sending.result(t); err != nil {
				for _, err := range err.(*cryo.BatchError).Errs { //nolint:errorlint // it is SendBatch's own
					_, rejected := errors.AsType[*cryo.RejectedError](err)
					require.True(t, err == nil || rejected || errors.Is(err, net.ErrClosed), "%v", err)
				}
			}
		})
	})
}

// play executes the script until a step fails.
func play(peer *cryotest.Peer, script []byte) {
	for len(script) >= 2 {
		step, n := script[0]%fuzzSteps, min(int(script[1]), len(script)-2)
		data := script[2 : 2+n]
		script = script[2+n:]
		var err error
		switch step {
		case fuzzFrame:
			frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xd6}, data...) // sid
			answerOurs(frame, peer.First)
			err = peer.WS.WriteMessage(websocket.BinaryMessage, frame)
		case fuzzMessage:
			err = peer.WS.WriteMessage(websocket.BinaryMessage, data)
		case fuzzText:
			err = peer.WS.WriteMessage(websocket.TextMessage, data)
		case fuzzRaw:
			_, err = peer.Conn().Write(data)
		case fuzzPause:
			time.Sleep(time.Duration(n) * 100 * time.Millisecond)
		}
		if err != nil {
			return
		}
	}
}

// answerOurs makes an ACK or ERROR whose number is 0x40000000 or more one for a number
// of the session, counted from its first: they are others in each session.
func answerOurs(frame []byte, first uint32) {
	if len(frame) < 13 || frame[8] != byte(wire.Ack) && frame[8] != byte(wire.Error) {
		return
	}
	if n := binary.BigEndian.Uint32(frame[9:]); n >= dialledFrom {
		binary.BigEndian.PutUint32(frame[9:], first+n-dialledFrom)
	}
}

// settleAll receives until the end, and settles one way or another.
func settleAll(s *cryo.Session) error {
	for i := 0; ; i++ {
		batch, err := s.ReceiveBatch(context.Background(), 3)
		if err != nil {
			return err
		}
		for j := range batch {
			if i%2 == 0 {
				_ = batch[j].Ack()
			} else {
				_ = batch[j].Reject("no")
			}
		}
	}
}
