package cryo_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// traffic is what one end sends: streams side by side, and messages in order.
type traffic struct {
	Streams  []streamPlan
	Messages []string
}

type streamPlan struct {
	Size, Chunk, Read int  // bytes: in all, of a chunk, at a time at the other end
	Indexed           bool // the source can be read by index, as it must be where it is pulled
	Reject            bool
}

var trafficPlans = rapid.Custom(func(t *rapid.T) traffic {
	return traffic{
		Streams: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) streamPlan {
			return streamPlan{
				Size:    rapid.IntRange(0, 200<<10).Draw(t, "size"),
				Chunk:   rapid.IntRange(1<<10, 64<<10).Draw(t, "chunk"),
				Read:    rapid.IntRange(1<<10, 100<<10).Draw(t, "read"),
				Indexed: rapid.Bool().Draw(t, "indexed"),
				Reject:  rapid.IntRange(0, 9).Draw(t, "reject") == 0,
			}
		}), 0, 5).Draw(t, "streams"),
		Messages: rapid.SliceOfN(rapid.StringMatching(`[a-zäß]{0,50}`), 0, 20).Draw(t, "messages"),
	}
})

func TestStreamsAndMessagesArriveIntactAndInOrder(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		client, server := trafficPlans.Draw(rt, "client"), trafficPlans.Draw(rt, "server")
		pulls := rapid.SampledFrom([]string{"", "client", "server", "both"}).Draw(rt, "pulls")
		buffer := rapid.IntRange(1, 1<<20).Draw(rt, "buffer")
		var problem error
		synctest.Test(t, func(t *testing.T) {
			opts := quiet
			opts.MaxBufferBytes = buffer
			p := connect(t, opts, opts)
			for name, s := range map[string]*cryo.Session{"client": p.client, "server": p.server} {
				if pulls == name || pulls == "both" {
					require.NoError(t, s.PullStreams(t.Context()))
				}
			}
			problem = errors.Join(run(
				client.send(t, p.client, pulls == "server" || pulls == "both"), client.receive(t, p.server),
				server.send(t, p.server, pulls == "client" || pulls == "both"), server.receive(t, p.client),
			)...)
		})
		if problem != nil {
			rt.Fatal(problem)
		}
	})
}

// run does many things at once and gives their errors.
func run(jobs ...[]func() error) (errs []error) {
	var (
		mu  sync.Mutex
		all sync.WaitGroup
	)
	for _, job := range jobs {
		for _, f := range job {
			all.Go(func() {
				if err := f(); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			})
		}
	}
	all.Wait()
	return errs
}

func (p *streamPlan) data() []byte { return noise(p.Size) }

func (plan traffic) send(t *testing.T, s *cryo.Session, pulled bool) (jobs []func() error) {
	for i, p := range plan.Streams {
		jobs = append(jobs, func() error {
			var source io.Reader = bytes.NewReader(p.data())
			if !p.Indexed && !pulled {
				source = io.MultiReader(source)
			}
			err := s.SendStream(t.Context(), source, &cryo.StreamOptions{Name: fmt.Sprint(i), ChunkBytes: p.Chunk})
			if p.Reject && errors.Is(err, cryo.ErrStreamCancelled) {
				return nil
			}
			if p.Reject || err != nil {
				return fmt.Errorf("sending stream %d: %w", i, err)
			}
			return nil
		})
	}
	return append(jobs, func() error {
		for _, text := range plan.Messages {
			if err := s.SendText(t.Context(), text); err != nil {
				return err
			}
		}
		return nil
	})
}

func (plan traffic) receive(t *testing.T, s *cryo.Session) (jobs []func() error) {
	for i, p := range plan.Streams {
		jobs = append(jobs, func() error {
			st, err := s.AcceptStream(t.Context(), fmt.Sprint(i))
			if err != nil {
				return err
			}
			got, err := readBy(st, p.Read)
			if err != nil || !bytes.Equal(p.data(), got) {
				return errors.Join(fmt.Errorf("stream %d: %d of %d bytes", i, len(got), p.Size), err, st.Close())
			}
			if p.Reject {
				return st.Close()
			}
			return st.Ack()
		})
	}
	return append(jobs, func() error {
		for _, want := range plan.Messages {
			m, err := s.Receive(t.Context())
			if err != nil {
				return err
			}
			if string(m.Payload) != want {
				return fmt.Errorf("%q came for %q", m.Payload, want)
			}
			if err := m.Ack(); err != nil {
				return err
			}
		}
		return nil
	})
}

func readBy(r io.Reader, n int) ([]byte, error) {
	var (
		got strings.Builder
		buf = make([]byte, n)
	)
	_, err := io.CopyBuffer(&got, struct{ io.Reader }{r}, buf)
	return []byte(got.String()), err
}
