package faults

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// line is a network line between a client and a server, with its faults.
type line struct {
	*toxiproxy.Proxy
	breaks *breaks
}

// newLine makes a line to a server, with the faults of toxiproxy in both directions, and
// with breaks. It is stopped and started at the same address.
func newLine(t *testing.T, upstream string, toxics []string, b *breaks) *line {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	l := &line{toxiproxy.NewProxy(server, t.Name(), testkit.ReserveAddress(t), upstream), b}
	add := func(format string, values ...any) {
		_, err := l.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(format, values...)))
		require.NoError(t, err)
	}
	id := planned.Add(1)
	plans.Store(id, b)
	for _, direction := range []string{"upstream", "downstream"} {
		for _, toxic := range toxics {
			add(`{ "stream": %q, %s }`, direction, toxic)
		}
		if b.reset {
			// With toxicity 0 its only effect is that a connection ends with a reset.
			add(`{ "stream": %q, "type": "reset_peer", "toxicity": 0, "attributes": {} }`, direction)
		}
		if b.times > 0 {
			add(`{ "stream": %q, "type": "break", "attributes": { "plan": %d, "up": %t } }`, direction, id, direction == "upstream")
		}
	}
	require.NoError(t, l.Start())
	t.Cleanup(func() {
		close(b.over)
		l.Stop()
		plans.Delete(id)
	})
	return l
}

// after is the state of one direction of a broken connection.
type after int

const (
	passed    after = iota // still works
	closed                 // its receiver reads the end
	swallowed              // data is dropped silently
)

// breaks are breaks of connections, each after a random number of bytes.
type breaks struct {
	times    int
	up, down after // up is from the client to the server
	reset    bool  // the end is a reset

	over chan struct{} // closed at the end of the test

	mu      sync.Mutex
	random  *rand.Rand
	done    int
	conns   []*conn // in the order in which they were opened
	ups     int     // how many of conns the toxic of this direction has
	downs   int     // how many the toxic of the other direction has
	allDone chan struct{}
}

// start must be called before the line is made.
func (b *breaks) start(random *rand.Rand) {
	b.random, b.over, b.allDone = random, make(chan struct{}), make(chan struct{})
	if b.times == 0 {
		close(b.allDone)
	}
}

// conn is one connection on a line.
type conn struct {
	of *breaks

	mu     sync.Mutex
	early  bool          // breaks within the handshake
	left   int           // bytes until it breaks, in both directions together
	broken chan struct{} // closed when it breaks
}

// half returns the next connection for the toxic of a direction. The proxy calls it for
// both directions before it accepts another connection.
func (b *breaks) half(up bool) *conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := &b.downs
	if up {
		n = &b.ups
	}
	*n++
	if *n > len(b.conns) {
		left := math.Exp2(5 + 6*b.random.Float64())
		b.conns = append(b.conns, &conn{of: b, early: true, left: int(left), broken: make(chan struct{})})
	}
	return b.conns[*n-1]
}

// pass counts n bytes of a direction, and returns how many of them pass.
func (b *breaks) pass(c *conn, then after, n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.isBroken() {
		if n >= c.left && c.early && !b.early() {
			c.early, c.left = false, b.later()
		}
		if n < c.left || !b.another() {
			c.left -= n
			return n
		}
		close(c.broken)
		if then != passed {
			return c.left
		}
	}
	if then != passed {
		return 0
	}
	return n
}

// isBroken reports whether the connection has broken.
func (c *conn) isBroken() bool {
	select {
	case <-c.broken:
		return true
	default:
		return false
	}
}

// early reports whether the next break is within the handshake: every other one is.
func (b *breaks) early() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.done%2 == 1
}

// later returns the bytes until a break after the handshake.
func (b *breaks) later() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return int(math.Exp2(11 + 6*b.random.Float64()))
}

// another counts a break; false is one too many.
func (b *breaks) another() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.done == b.times {
		return false
	}
	if b.done++; b.done == b.times {
		close(b.allDone)
	}
	return true
}

// enough reports whether every break has happened.
func (b *breaks) enough() bool {
	select {
	case <-b.allDone:
		return true
	default:
		return false
	}
}

// breaker is the toxic of one direction.
type breaker struct {
	Plan int64 `json:"plan"`
	Up   bool  `json:"up"`
}

var (
	planned atomic.Int64
	plans   sync.Map // breaks by id: toxics are configured with JSON
)

func init() { toxics.Register("break", new(breaker)) }

// NewState is called for each connection.
func (t *breaker) NewState() any {
	b, _ := plans.Load(t.Plan)
	return b.(*breaks).half(t.Up)
}

// Pipe passes data until the connection breaks. It reads its input to the end, or the
// proxy's goroutines would stay.
func (t *breaker) Pipe(stub *toxics.ToxicStub) {
	c := stub.State.(*conn)
	b := c.of
	then := b.down
	if t.Up {
		then = b.up
	}
	end := func() {
		stub.Close()
		for range stub.Input { // discarded
		}
	}
	broken := c.broken
	for {
		select {
		case <-broken:
			if then == closed {
				end()
				return
			}
			broken = nil
		case chunk := <-stub.Input:
			if chunk == nil {
				if c.isBroken() && then == swallowed {
					<-b.over
				}
				end()
				return
			}
			n := b.pass(c, then, len(chunk.Data))
			if n == 0 {
				continue
			}
			select {
			case stub.Output <- &stream.StreamChunk{Data: chunk.Data[:n], Timestamp: chunk.Timestamp}:
			case <-b.over:
			}
		}
	}
}
