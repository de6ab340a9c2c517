package cryo

import (
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// Bounds of the interval between unsolicited pongs. It is half the last interval between
// two pings, and the longest before there were two.
const (
	minKeepaliveInterval = 50 * time.Millisecond
	maxKeepaliveInterval = 5 * time.Second
)

// pingsBehind is the number of bytes received without a ping after which unread pings are
// assumed behind them.
const pingsBehind = 16 << 10

// minProgress is the number of bytes of a backlog that must be delivered between two
// heartbeats, unless the backlog is smaller.
const minProgress = 4 << 10

// keepalive detects a lost peer by heartbeats, and at a dialling end keeps the session alive at
// the peer by unsolicited pongs. It reaches the session only through its function fields.
// They are called without a lock held, by timers, and pong by the reading goroutine too; they
// must not wait.
type keepalive struct {
	conn        *ws.Conn
	dialing     bool
	interval    time.Duration         // between heartbeats
	paused      func() bool           // reports whether reads are paused (backpressure)
	resumed     func() time.Time      // end of the last pause; zero before there was one
	ping        func(cryo bool)       // sends a WebSocket ping and, if cryo is set, a Cryo ping
	pong        func(number uint32)   // sends a Cryo pong
	onHeartbeat func()                // called at each heartbeat
	onTimeout   func(d time.Duration) // called when the peer was not alive for d; no heartbeat follows

	// Owned by the heartbeat's timer, whose function runs once at a time.
	missed             int   // heartbeats in a row at which the peer was not alive
	delivered, backlog int64 // progress of the connection at the last heartbeat, in bytes
	halfway            bool  // the timer fires between two heartbeats

	lastPing time.Time // owned by the reading goroutine

	mu                sync.Mutex
	stopped           bool // no timer is set any more
	heartbeatTimer    *time.Timer
	keepaliveTimer    *time.Timer // nil at a listening end
	keepaliveInterval time.Duration
	pingNumber        uint32 // number of the last ping
	receivedAtPing    int64  // bytes received until then, or until the last unsolicited pong
}

func (k *keepalive) start() {
	k.mu.Lock() // a timer's function may run before the assignment otherwise
	defer k.mu.Unlock()
	k.heartbeatTimer = time.AfterFunc(k.interval, k.heartbeat)
	if k.dialing {
		k.keepaliveInterval = maxKeepaliveInterval
		k.keepaliveTimer = time.AfterFunc(k.keepaliveInterval, k.sendKeepalive)
	}
}

// stop stops the timers, for good.
func (k *keepalive) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.stopped = true
	k.heartbeatTimer.Stop()
	if k.dialing {
		k.keepaliveTimer.Stop()
	}
}

// heartbeat pings the peer, or reports a timeout if the peer was not alive at two heartbeats
// in a row. While reads are paused nothing is received, so time does not count, and a closed
// connection is detected only by writing: the first ping to a lost peer makes its kernel reset
// the connection, and the next one fails. So another ping is sent halfway between two
// heartbeats then.
func (k *keepalive) heartbeat() {
	if k.halfway {
		k.halfway = false
		k.ping(false) // Cryo pings keep their interval: peers derive their own from it
		k.setHeartbeat(k.interval - k.interval/2)
		return
	}
	paused := k.paused()
	if k.alive() || paused {
		k.missed = 0
	} else if k.missed++; k.missed == 2 {
		k.onTimeout(2 * k.interval)
		return
	}
	k.onHeartbeat()
	k.ping(!k.dialing)
	if k.halfway = paused; paused {
		k.setHeartbeat(k.interval / 2)
	} else {
		k.setHeartbeat(k.interval)
	}
}

func (k *keepalive) setHeartbeat(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.stopped {
		k.heartbeatTimer.Reset(d)
	}
}

// alive reports whether, since the last call, anything was received, or some of the backlog
// at that call was delivered. A large message may occupy a slow connection for many heartbeats,
// with our pings behind it. Bytes without a backlog are no evidence: they may be in buffers.
func (k *keepalive) alive() bool {
	delivered, backlog := k.conn.Progress()
	progress := k.backlog > 0 && delivered-k.delivered >= min(k.backlog, minProgress)
	k.delivered, k.backlog = delivered, backlog
	return k.conn.Heard() || progress
}

// pinged answers a ping. Reading goroutine.
func (k *keepalive) pinged(number uint32) {
	k.pong(number)
	if !k.dialing {
		return
	}
	now := time.Now()
	// Pings that arrived while reads were paused are read late, and all at the same time.
	every := now.Sub(k.lastPing)
	regular := !k.lastPing.IsZero() && every >= 2*minKeepaliveInterval && k.lastPing.After(k.resumed())
	k.lastPing = now
	k.mu.Lock()
	defer k.mu.Unlock()
	if regular {
		k.keepaliveInterval = min(every/2, maxKeepaliveInterval)
	}
	k.pingNumber, k.receivedAtPing = number, k.conn.Received()
	if !k.stopped {
		k.keepaliveTimer.Reset(k.keepaliveInterval)
	}
}

// sendKeepalive sends an unsolicited pong if pings may be unread: reads are paused, or so much
// was received that pings may be behind it. cryo-server ends sessions without pongs. A
// listening end sends none: cryo-client-node answers a pong with a ping.
func (k *keepalive) sendKeepalive() {
	paused, received := k.paused(), k.conn.Received()
	k.mu.Lock()
	number := k.pingNumber
	unseen := paused || received-k.receivedAtPing >= pingsBehind
	if unseen {
		k.receivedAtPing = received
	}
	if !k.stopped {
		k.keepaliveTimer.Reset(k.keepaliveInterval)
	}
	k.mu.Unlock()
	if unseen {
		k.pong(number)
	}
}
