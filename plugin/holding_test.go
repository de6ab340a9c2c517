package plugin

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A client that answers nothing costs one ack_timeout, not one for each stream.
func TestASilentClientHoldsUpABroadcastOfStreamsOnce(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "ack_timeout: 3s, message_type: stream"))
		good := e.dial()
		e.rawClient() // never answers
		synctest.Wait()
		go func() {
			for {
				st, err := good.AcceptStream(context.Background())
				if err != nil {
					return
				}
				go func() {
					_, _ = st.Read(make([]byte, 10))
					_, _ = st.Read(make([]byte, 10))
					_ = st.Ack()
				}()
			}
		}()
		begin := time.Now()
		f := e.give(words("m%d", 20)...)
		f.wantDelivered(t, "")
		end(good)
		require.LessOrEqual(t, time.Since(begin), 4*time.Second)
	})
}

// hook is a log handler that does something at a line.
type hook struct {
	word string
	do   func()
}

func (h *hook) Enabled(context.Context, slog.Level) bool { return true }
func (h *hook) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, h.word) {
		h.do()
	}
	return nil
}
func (h *hook) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *hook) WithGroup(string) slog.Handler      { return h }

// A verdict may come while its input closes: the message is settled all the same.
func TestAFailureThatCrossesTheEndOfItsInputLeavesTheMessageToTheNextInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		client := e.dial()
		in := e.aloneServerInput(t, "")
		require.NoError(t, in.Connect(t.Context()))
		m := send(client, "hello")
		_, ack, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		h := &hook{word: "Redelivering a message"}
		h.do = func() { require.NoError(t, in.Close(t.Context())) }
		in.receiver.log = service.NewLoggerFromSlog(slog.New(h))
		require.NoError(t, ack(t.Context(), errors.New("failed")))
		m.wantPending(t, "another input may follow")
		m.wantRefused(t, rejection)
	})
}

func TestAStreamNamedAfterTheTokenIsLoggedWithoutIt(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(dialInput, toProbe)
		s := server.session()
		st, err := s.OpenStream(context.Background(), &cryo.StreamOptions{Name: "hello " + token})
		require.NoError(t, err)
		_, err = st.Write([]byte("x"))
		require.NoError(t, err)
		synctest.Wait()
		end(s)
		time.Sleep(time.Second)
		for _, line := range e.log.all() {
			require.NotContains(t, line, token)
		}
	})
}

func (e *engine) aloneServerInput(t *testing.T, fields string) *serverInput {
	t.Helper()
	conf, err := specs()["input cryo_server"].ParseYAML("{ address: '"+somewhere+"', tokens: [ "+token+" ]"+fields+" }", nil)
	require.NoError(t, err)
	res := service.MockResources()
	res.GetOrSetGeneric(listenersKey{}, e.shared)
	in, err := newServerInput(conf, res)
	require.NoError(t, err)
	return in
}
