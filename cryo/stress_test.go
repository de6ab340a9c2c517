package cryo_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// stormSeeds returns the seeds of so many storms, or the one that CRYO_SEED names.
func stormSeeds(t *testing.T, usually, long int) (seeds []uint64) {
	t.Helper()
	if given := os.Getenv("CRYO_SEED"); given != "" {
		seed, err := strconv.ParseUint(given, 10, 64)
		require.NoError(t, err, "CRYO_SEED")
		return []uint64{seed}
	}
	if os.Getenv("CRYO_LONG_TESTS") == "1" {
		usually = long
	}
	first := uint64(time.Now().UnixNano())
	for i := range usually {
		seeds = append(seeds, first+uint64(i))
	}
	return seeds
}

// Random traffic in both directions between two ends of this library: nothing changes on
// its way, in its receiver's hands, or after that; nothing is acknowledged to its sender
// that its receiver has not acknowledged; nothing is left in the end.
func TestStress(t *testing.T) {
	cryo.Poison(true)
	defer cryo.Poison(false)
	var all stormSummary
	seeds := stormSeeds(t, 200, 20_000)
	for _, seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStorm(t, seed, 1)
				p := connect(t, s.options(), s.options())
				all.add(s.run(p.client, p.server, p.conn.Cut))
			})
		})
	}
	if len(seeds) > 1 {
		require.Greater(t, all.acknowledged, 10*len(seeds), "%+v", all)
		require.Greater(t, all.rejected, 10*len(seeds), "%+v", all)
		require.Greater(t, all.lost, 5*len(seeds), "%+v", all)
		require.Greater(t, all.streams, len(seeds), "%+v", all)
		require.Greater(t, all.streamsLost, len(seeds), "%+v", all)
		require.Greater(t, all.cutShort, len(seeds), "%+v", all)
	}
}

func TestStressOverTheNetwork(t *testing.T) {
	cryo.Poison(true)
	defer cryo.Poison(false)
	for _, network := range []string{"TCP", "TLS"} {
		t.Run(network, func(t *testing.T) {
			for _, seed := range stormSeeds(t, 10, 500) {
				t.Run(fmt.Sprint(seed), func(t *testing.T) {
					t.Parallel() // they wait most of the time
					s := newStorm(t, seed, 200)
					sessions := make(chan *cryo.Session, 1)
					listener := httptest.NewUnstartedServer(newServer(t, cryo.ServerOptions{
						SessionOptions: s.options(),
						Authorize:      cryo.Tokens(token),
						OnSession:      func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
					}))
					listener.Config.ErrorLog = log.New(io.Discard, "", 0)
					opts := cryo.DialOptions{SessionOptions: s.options(), Token: token}
					if network == "TLS" {
						listener.StartTLS()
						roots := x509.NewCertPool()
						roots.AddCert(listener.Certificate())
						opts.TLS = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}
					} else {
						listener.Start()
					}
					defer listener.Close()
					client, err := cryo.Dial(t.Context(), strings.Replace(listener.URL, "http", "ws", 1), &opts)
					require.NoError(t, err)
					server := next(t, sessions)
					s.run(client, server, func() { cut(client) })
				})
			}
		})
	}
}

// storm is traffic, and what has become of it.
type storm struct {
	t    *testing.T
	seed uint64
	fast time.Duration // time is divided by this
	rngs atomic.Uint64
	ids  atomic.Uint64

	mu      sync.Mutex
	sent    map[uint64]*fate
	tiny    map[tinyKind]int // how many of these were acknowledged, less those whose senders know
	kept    [][]byte         // what was received, with a name and a checksum in it
	summary stormSummary
}

// stormSummary counts what has become of messages and streams.
type stormSummary struct {
	acknowledged, rejected, lost int // messages, as reported to their senders
	streams, streamsLost         int // likewise
	cutShort                     int // streams, at their receivers
}

func (a *stormSummary) add(b stormSummary) {
	a.acknowledged += b.acknowledged
	a.rejected += b.rejected
	a.lost += b.lost
	a.streams += b.streams
	a.streamsLost += b.streamsLost
	a.cutShort += b.cutShort
}

// fate is what has become of a message or a stream.
type fate struct {
	size         int
	sum          uint32
	received     bool
	acknowledged bool // by its receiver
}

// tinyKind are messages without a name: they are too small for one.
type tinyKind struct {
	to   *cryo.Session
	size int
}

const (
	stormHead = 8 + 4 // of a payload: a name, and the checksum of the rest
	stormMost = 1 << 20
)

// stormNoise is not there for benchmarks: a larger heap is collected less often.
var stormNoise = sync.OnceValue(func() []byte { return noise(2 * stormMost) })

func newStorm(t *testing.T, seed uint64, fast int) *storm {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("CRYO_SEED=%d makes the same random choices", seed)
		}
	})
	return &storm{t: t, seed: seed, fast: time.Duration(fast), sent: make(map[uint64]*fate), tiny: make(map[tinyKind]int)}
}

// random returns other choices to each goroutine.
func (s *storm) random() *rand.Rand { return rand.New(rand.NewPCG(s.seed, s.rngs.Add(1))) }

func (s *storm) options() cryo.SessionOptions {
	r := s.random()
	opts := quiet
	opts.MaxBufferBytes = []int{1_000, 3_000, 10_000, 30_000, 100_000, cryo.DefaultMaxBufferBytes}[r.IntN(6)]
	opts.CloseTimeout = 5 * time.Second / s.fast
	return opts
}

// pause lets up to so much time pass.
func (s *storm) pause(r *rand.Rand, most time.Duration) {
	if d := time.Duration(r.Int64N(int64(most))) / s.fast; d > 0 {
		time.Sleep(d)
	}
}

func (s *storm) run(client, server *cryo.Session, lose func()) stormSummary {
	var sending, receiving sync.WaitGroup
	stop := make(chan struct{})
	for _, to := range []*cryo.Session{server, client} {
		from := client
		if to == client {
			from = server
		}
		for range 3 {
			r := s.random()
			sending.Go(func() { s.sendMessages(r, from, to) })
		}
		for range 2 {
			r := s.random()
			sending.Go(func() { s.sendStreams(r, from) })
		}
		messages, streams, trouble := s.random(), s.random(), s.random()
		receiving.Go(func() { s.receiveMessages(messages, to) })
		receiving.Go(func() { s.receiveStreams(streams, to) })
		receiving.Go(func() { s.trouble(trouble, to, stop) })
	}
	r := s.random()
	if r.IntN(4) == 0 {
		sending.Go(func() {
			s.pause(r, time.Minute)
			lose()
		})
	}
	sending.Wait()
	close(stop)
	ends := []*cryo.Session{client, server}
	first := r.IntN(2)
	if err := ends[first].Close(context.Background(), "the end"); err != nil {
		s.t.Error("closing:", err)
	}
	if r.IntN(2) == 0 {
		_ = ends[1-first].Close(context.Background(), "the end")
	}
	for _, end := range ends {
		<-end.Done()
	}
	receiving.Wait()

	for _, payload := range s.kept {
		s.check(payload, "what was received, in the end")
	}
	for _, end := range ends {
		if closed, ok := errors.AsType[*cryo.PeerClosedError](end.Err()); ok {
			require.Contains(s.t, []int{0, 4000}, closed.Code, "how it ended: %v", closed)
		}
		_, broken := errors.AsType[*cryo.ProtocolError](end.Err())
		require.False(s.t, broken, "neither end breaks the protocol: %v", end.Err())
		require.Zero(s.t, end.Awaited(), "numbers that are still awaited")
		require.Zero(s.t, end.Held(), "bytes that are still held")
	}
	return s.summary
}

// trouble holds memory for a while, and receives nothing for a while.
func (s *storm) trouble(r *rand.Rand, session *cryo.Session, stop chan struct{}) {
	for {
		what, size := []int{0, 0, 0, 0, 1, 1, 1, 1, 2}[r.IntN(9)], r.IntN(40_000)
		release := func() {}
		switch what {
		case 0:
			session.SetSendOnly(true)
		case 1:
			release = session.Reserve(size)
		default:
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute/s.fast)
			err := session.PullStreams(ctx)
			cancel()
			if err != nil && session.Err() == nil && !errors.Is(err, context.DeadlineExceeded) {
				s.t.Error("asking to pull:", err)
			}
		}
		s.pause(r, 15*time.Second)
		switch what {
		case 0:
			session.SetSendOnly(false)
		case 1:
			release()
		}
		select {
		case <-stop:
			return
		case <-session.Done():
			return
		case <-time.After(time.Duration(r.Int64N(int64(20*time.Second))) / s.fast):
		}
	}
}

// size is that of a message, or of a stream.
func size(r *rand.Rand) int {
	switch n := r.IntN(1000); {
	case n < 500:
		return r.IntN(300)
	case n < 890:
		return r.IntN(8 << 10)
	case n < 910:
		return r.IntN(64 << 10)
	case n < 998:
		return 64<<10 + r.IntN(8<<10)
	default:
		return r.IntN(stormMost)
	}
}

// payload makes and records a payload that identifies itself.
func (s *storm) payload(r *rand.Rand) (id uint64, payload []byte) {
	n := size(r)
	if n < stormHead {
		return 0, stormNoise()[:n:n]
	}
	payload = make([]byte, n)
	copy(payload[stormHead:], stormNoise()[r.IntN(stormMost):])
	id = s.ids.Add(1)
	sum := crc32.ChecksumIEEE(payload[stormHead:])
	binary.BigEndian.PutUint64(payload, id)
	binary.BigEndian.PutUint32(payload[8:], sum)
	s.mu.Lock()
	s.sent[id] = &fate{size: n, sum: sum}
	s.mu.Unlock()
	return id, payload
}

// check compares a payload with the one that was made, and returns its identity.
func (s *storm) check(payload []byte, when string) *fate {
	if len(payload) < stormHead {
		if !bytes.Equal(payload, stormNoise()[:len(payload)]) {
			s.t.Errorf("%s: %d bytes are %x", when, len(payload), payload)
		}
		return nil
	}
	s.mu.Lock()
	f := s.sent[binary.BigEndian.Uint64(payload)]
	s.mu.Unlock()
	sum := binary.BigEndian.Uint32(payload[8:])
	if f == nil || f.size != len(payload) || f.sum != sum || crc32.ChecksumIEEE(payload[stormHead:]) != sum {
		s.t.Errorf("%s: %d bytes that begin with %x are not what was sent", when, len(payload), payload[:stormHead])
		return nil
	}
	return f
}

func (s *storm) sendMessages(r *rand.Rand, from, to *cryo.Session) {
	for range 10 {
		if from.Err() != nil {
			return
		}
		batch := make([]cryo.OutMessage, 1+r.IntN(8)*r.IntN(2))
		ids := make([]uint64, len(batch))
		for i := range batch {
			ids[i], batch[i].Payload = s.payload(r)
			batch[i].Kind = cryo.KindBinary
		}
		patience := time.Minute
		if r.IntN(4) == 0 {
			patience = time.Duration(r.Int64N(int64(12 * time.Second)))
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience/s.fast)
		var err error
		switch {
		case r.IntN(3) == 0:
			err = from.Queue(batch).Wait(ctx)
		case len(batch) == 1:
			if err = from.SendBinary(ctx, batch[0].Payload); err != nil {
				err = &cryo.BatchError{Errs: []error{err}}
			}
		default:
			err = from.SendBatch(ctx, batch)
		}
		s.sentMessages(to, ids, batch, err, ctx.Err() != nil)
		cancel()
		s.pause(r, 3*time.Second)
	}
}

// sentMessages compares a sender.s results with the receiver.s actions, and uses
// the memory again that is the sender's again.
func (s *storm) sentMessages(to *cryo.Session, ids []uint64, batch []cryo.OutMessage, err error, givenUp bool) {
	errs := make([]error, len(ids))
	if failed, ok := errors.AsType[*cryo.BatchError](err); ok {
		errs = failed.Errs
	} else if err != nil {
		s.t.Error("sending:", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, id := range ids {
		_, rejected := errors.AsType[*cryo.RejectedError](errs[i])
		switch {
		case rejected:
			s.summary.rejected++
		case errs[i] != nil:
			s.summary.lost++
		case id == 0:
			kind := tinyKind{to, len(batch[i].Payload)}
			if s.tiny[kind]--; s.tiny[kind] < 0 {
				s.t.Errorf("more messages of %d bytes are acknowledged than were", kind.size)
			}
		case !s.sent[id].acknowledged:
			s.t.Errorf("%d is acknowledged, which nobody has acknowledged", id)
		}
		if errs[i] == nil {
			s.summary.acknowledged++
		}
		if id != 0 && (errs[i] == nil || rejected && !givenUp) {
			clear(batch[i].Payload)
		}
	}
}

func (s *storm) receiveMessages(r *rand.Rand, session *cryo.Session) {
	var settling sync.WaitGroup
	defer settling.Wait()
	for {
		var batch []*cryo.Message
		if r.IntN(2) == 0 {
			m, err := session.Receive(context.Background())
			if err != nil {
				return
			}
			batch = []*cryo.Message{m}
		} else {
			var err error
			if batch, err = session.ReceiveBatch(context.Background(), 1+r.IntN(9)); err != nil {
				return
			}
		}
		for i := range batch {
			f := s.check(batch[i].Payload, "a message, when it is received")
			s.mu.Lock()
			if f != nil && f.received {
				s.t.Error("a message came twice")
			} else if f != nil {
				f.received = true
			}
			s.kept = append(s.kept, batch[i].Payload)
			s.mu.Unlock()
		}
		wait := []time.Duration{1, time.Second, 5 * time.Second, 15 * time.Second}[r.IntN(4)]
		own := rand.New(rand.NewPCG(r.Uint64(), 0))
		if r.IntN(3) == 0 {
			s.settle(own, session, batch, wait)
		} else {
			settling.Go(func() { s.settle(own, session, batch, wait) })
		}
	}
}

// settle settles messages after a while, each once, though it tries to do so twice.
func (s *storm) settle(r *rand.Rand, session *cryo.Session, batch []*cryo.Message, wait time.Duration) {
	s.pause(r, wait)
	var acknowledge []*cryo.Message
	for _, m := range batch {
		f := s.check(m.Payload, "a message, when it is settled")
		if r.IntN(6) == 0 {
			_ = m.Reject("no")
			_ = m.Ack()
			continue
		}
		s.mu.Lock()
		if f != nil {
			f.acknowledged = true
		} else {
			s.tiny[tinyKind{session, len(m.Payload)}]++
		}
		s.mu.Unlock()
		acknowledge = append(acknowledge, m, m)
		if r.IntN(2) == 0 {
			_ = m.Ack()
			_ = m.Reject("too late")
		}
	}
	_ = cryo.AckBatch(acknowledge)
}

// sendStreams sends streams whose names identify them.
func (s *storm) sendStreams(r *rand.Rand, from *cryo.Session) {
	for range 3 {
		if from.Err() != nil {
			return
		}
		id, n, at := s.ids.Add(1), size(r)*(1+r.IntN(3)), r.IntN(stormMost)
		n = min(n, stormMost)
		data := bytes.Clone(stormNoise()[at : at+n])
		f := &fate{size: n, sum: crc32.ChecksumIEEE(data)}
		s.mu.Lock()
		s.sent[id] = f
		s.mu.Unlock()
		opts := &cryo.StreamOptions{Name: fmt.Sprintf("%d.%d.%d", id, n, at), ChunkBytes: 1 + size(r)}
		opts.ChunkBytes = max(opts.ChunkBytes, n/200)
		patience := 2 * time.Minute
		if r.IntN(4) == 0 {
			patience = time.Duration(r.Int64N(int64(20 * time.Second)))
		}
		if r.IntN(2) == 0 {
			opts.StepTimeout = 30 * time.Second / s.fast
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience/s.fast)
		var err error
		switch r.IntN(4) {
		case 0:
			err = from.SendStream(ctx, bytes.NewReader(data), opts)
		case 1:
			err = from.SendStream(ctx, strings.NewReader(string(data)), opts)
		case 2:
			err = from.SendStream(ctx, io.MultiReader(bytes.NewReader(data)), opts)
		default:
			err = s.writeStream(ctx, r, from, data, opts)
		}
		cancel()
		s.mu.Lock()
		if err == nil && !f.acknowledged {
			s.t.Errorf("the stream %d is acknowledged, which nobody has acknowledged", id)
		}
		if err == nil {
			s.summary.streams++
		} else {
			s.summary.streamsLost++
		}
		s.mu.Unlock()
		if err == nil {
			clear(data)
		}
		s.pause(r, 3*time.Second)
	}
}

func (s *storm) writeStream(ctx context.Context, r *rand.Rand, from *cryo.Session, data []byte, opts *cryo.StreamOptions) error {
	st, err := from.OpenStream(ctx, opts)
	if err != nil {
		return err
	}
	defer st.Close()
	abandon := r.IntN(4) == 0
	buf := make([]byte, 0, 100<<10)
	for len(data) > 0 {
		buf = append(buf[:0], data[:min(len(data), 1+r.IntN(cap(buf)))]...)
		data = data[len(buf):]
		if _, err := st.Write(buf); err != nil {
			return err
		}
		if abandon && r.IntN(3) == 0 {
			return errors.New("abandoned")
		}
		s.pause(r, 2)
	}
	return st.Finish()
}

func (s *storm) receiveStreams(r *rand.Rand, session *cryo.Session) {
	var reading sync.WaitGroup
	defer reading.Wait()
	for {
		st, err := session.AcceptStream(context.Background())
		if err != nil {
			return
		}
		own := rand.New(rand.NewPCG(r.Uint64(), 0))
		reading.Go(func() { s.readStream(own, st) })
	}
}

func (s *storm) readStream(r *rand.Rand, st *cryo.IncomingStream) {
	var (
		id    uint64
		n, at int
	)
	if _, err := fmt.Sscanf(st.Name(), "%d.%d.%d", &id, &n, &at); err != nil {
		s.t.Errorf("a stream with the name %q: %v", st.Name(), err)
		return
	}
	want := stormNoise()[at : at+n]
	defer func() { _ = st.Close() }() // if it is not settled
	rejects, slow, tried, got := r.IntN(6) == 0, r.IntN(3) == 0, false, 0
	buf := make([]byte, 1+size(r))
	for {
		k, err := st.Read(buf)
		if got+k > len(want) || !bytes.Equal(buf[:k], want[got:got+k]) {
			s.t.Errorf("the stream %d has other bytes than were sent, behind the first %d", id, got)
			return
		}
		got += k
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.mu.Lock()
			s.summary.cutShort++
			s.mu.Unlock()
			tried = tried || errors.Is(err, cryo.ErrStreamClosed) // by SetSendOnly
			if r.IntN(2) == 0 && !tried && st.Ack() == nil {
				s.t.Errorf("the stream %d, of which something is missing, can be acknowledged", id)
			}
			return
		}
		if r.IntN(20) == 0 {
			_, tried = st.Ack(), true // too early
		}
		if rejects && r.IntN(4) == 0 {
			return
		}
		if slow {
			s.pause(r, time.Second)
		}
	}
	if got != n {
		s.t.Errorf("the stream %d is whole with %d of %d bytes", id, got, n)
	}
	s.pause(r, 5*time.Second)
	if rejects {
		return
	}
	s.mu.Lock()
	s.sent[id].acknowledged = true
	s.mu.Unlock()
	_ = st.Ack()
}
