//go:build linux

package chaos

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Messages and streams are units: each has an id, with which its contents begin.

const idDigits = 9

type unit struct {
	app       int // index of the sender
	kind      cryo.Kind
	sum       string // SHA-256 of the contents, hexadecimal
	acked     bool
	delivered int // how often
}

// ledger records what was sent, acknowledged and delivered on a route. Its methods may be
// called from any goroutine.
type ledger struct {
	t *testing.T

	mu        sync.Mutex
	units     []unit
	acked     int
	delivered int         // units, once or more
	again     int         // deliveries that were not the first
	lastFirst map[int]int // the newest unit of each sender that was delivered; nil where order is not promised
}

// unit makes the next unit, with random contents.
func (l *ledger) unit(app int, kind cryo.Kind, random *rand.Rand) (id int, contents []byte) {
	size := random.IntN(400)
	switch {
	case kind == cryo.KindStream:
		size = random.IntN(1 << (8 + random.IntN(10))) // most are small
	case random.IntN(100) == 0:
		size = random.IntN(50_000)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	id = len(l.units)
	contents = fmt.Appendf(make([]byte, 0, idDigits+1+size), "%0*d ", idDigits, id)
	for range size {
		if kind == cryo.KindText {
			contents = append(contents, byte('a'+random.IntN(26)))
		} else {
			contents = append(contents, byte(random.IntN(256)))
		}
	}
	l.units = append(l.units, unit{app: app, kind: kind, sum: sumOf(contents)})
	return id, contents
}

func sumOf(contents []byte) string {
	sum := sha256.Sum256(contents)
	return hex.EncodeToString(sum[:])
}

// streamName returns the name of the stream of a unit.
func streamName(id int) string { return "stream-" + strconv.Itoa(id) }

// ack records an acknowledgement to the sender.
func (l *ledger) ack(id int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.units[id].acked {
		l.units[id].acked = true
		l.acked++
	}
}

// check reports contents that were not sent like that.
func (l *ledger) check(where string, id int, kind, name, sum string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !assert.Less(l.t, id, len(l.units), "%s has a unit that was never sent", where) {
		return false
	}
	u := l.units[id]
	if u.kind == cryo.KindStream {
		assert.Equal(l.t, streamName(id), name, "%s: the stream's name", where)
	}
	want := map[cryo.Kind]string{cryo.KindText: "utf8", cryo.KindBinary: "binary", cryo.KindStream: "stream"}[u.kind]
	assert.Equal(l.t, want, kind, "%s: the type of unit %d", where, id)
	return assert.Equal(l.t, u.sum, sum, "%s: the contents of unit %d are not whole", where, id)
}

// deliver records a delivery.
func (l *ledger) deliver(id int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := &l.units[id]
	if u.delivered++; u.delivered > 1 {
		l.again++
		return
	}
	l.delivered++
	if l.lastFirst == nil {
		return
	}
	if last, ok := l.lastFirst[u.app]; ok && last > id {
		assert.Fail(l.t, "out of order", "unit %d of sender %d was first delivered after unit %d", id, u.app, last)
	}
	l.lastFirst[u.app] = max(id, l.lastFirst[u.app])
}

// isDelivered reports whether a unit was delivered.
func (l *ledger) isDelivered(id int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.units[id].delivered > 0
}

// ackedFrom returns the acknowledged units from an id on, and the first that is not.
func (l *ledger) ackedFrom(first int) (ids []int, next int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	next = len(l.units)
	for id := first; id < len(l.units); id++ {
		if l.units[id].acked {
			ids = append(ids, id)
		} else {
			next = min(next, id)
		}
	}
	return ids, next
}

// counts are the totals of a ledger.
type counts struct{ messages, streams, acked, delivered, again int }

func (l *ledger) counts() counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := counts{acked: l.acked, delivered: l.delivered, again: l.again}
	for _, u := range l.units {
		if u.kind == cryo.KindStream {
			c.streams++
		} else {
			c.messages++
		}
	}
	return c
}

// progress returns how many units are sent, acknowledged and delivered.
func (l *ledger) progress() (sent, acked, delivered int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.units), l.acked, l.delivered
}

// missing returns some of the units that are not delivered.
func (l *ledger) missing() (ids []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, u := range l.units {
		if u.delivered == 0 && len(ids) < 20 {
			ids = append(ids, id)
		}
	}
	return ids
}

// sink is the file in which a route ends. It has a line for each delivery, and torn ones
// where the disk was full.
type sink struct {
	path   string
	ledger *ledger

	mu     sync.Mutex
	offset int64
	torn   int
}

// line of the sink, whose last part makes a torn one recognisable; made by sinkMapping.
var sinkLine = regexp.MustCompile(`^(\d{9}) (utf8|binary|stream) (\S*) ([0-9a-f]{64})$`)

const sinkMapping = `root = "\n%s %s %s %s\n".format(content().slice(0, 9).string(), @cryo_message_type, @cryo_stream_name.or(""), content().hash("sha256").encode("hex"))`

// read records what was delivered up to now.
func (s *sink) read() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	file, err := os.Open(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Seek(s.offset, io.SeekStart); err != nil {
		return err
	}
	for lines := bufio.NewReader(file); ; {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil // an incomplete line is read when it is complete
		}
		if err != nil {
			return err
		}
		s.offset += int64(len(line))
		line = strings.TrimSuffix(line, "\n")
		if line == "" {
			continue
		}
		match := sinkLine.FindStringSubmatch(line)
		if match == nil {
			s.torn++
			continue
		}
		id, _ := strconv.Atoi(match[1])
		if s.ledger.check(s.path, id, match[2], match[3], match[4]) {
			s.ledger.deliver(id)
		}
	}
}
