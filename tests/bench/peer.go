package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

// A peer is the other end of a load, in its own process: this program, started again
// with a peerSpec in its environment. It reads commands from its standard input, one a
// line, and responds to each with a line.

const peerVariable = "CRYO_BENCH_PEER"

// The protocols of a peer.
const (
	speaksCryo      = "cryo"
	speaksStreams   = "streams"   // Cryo; each command sends one stream of chunks of Size
	speaksWebSocket = "websocket" // nothing is acknowledged
	speaksLines     = "lines"     // over TCP, nothing is acknowledged
	speaksPlain     = "plain"     // the loops' Cryo, with the other end of a loop
	speaksGathered  = "gathered"
)

// peerSpec configures a peer.
type peerSpec struct {
	Protocol string
	Source   bool   // sends on command; otherwise it acknowledges what it receives
	Dial     string // the address to dial; empty is to listen
	Sessions int    // to dial
	Window   int    // maximum of unacknowledged messages, of all sessions together
	Size     int    // of a message's payload, in bytes
}

// report is a peer's response.
type report struct {
	CPU     time.Duration   // used since the peer was started
	Latency []time.Duration // from send to acknowledgement, of a paced command
}

// peer is the handle of a peer's process.
type peer struct {
	process *exec.Cmd
	orders  io.WriteCloser
	answers *bufio.Scanner
	address string // where it listens

	reserved io.Closer // the address that it dials; nil if it listens
}

func startPeer(spec peerSpec) (*peer, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &peer{process: exec.Command(self)}
	p.process.Env = append(os.Environ(), peerVariable+"="+string(text))
	p.process.Stderr = os.Stderr
	if p.orders, err = p.process.StdinPipe(); err != nil {
		return nil, err
	}
	answers, err := p.process.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.answers = bufio.NewScanner(answers)
	p.answers.Buffer(nil, 64<<20)
	if err := p.process.Start(); err != nil {
		return nil, err
	}
	p.address, err = p.answer()
	return p, err
}

func (p *peer) answer() (string, error) {
	if !p.answers.Scan() {
		return "", errors.New("the peer has ended")
	}
	return p.answers.Text(), nil
}

// order sends a command to the peer, and waits until it is done.
func (p *peer) order(format string, args ...any) (r report, err error) {
	if _, err = fmt.Fprintf(p.orders, format+"\n", args...); err != nil {
		return r, err
	}
	text, err := p.answer()
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal([]byte(text), &r)
}

func (p *peer) stop() {
	_ = p.orders.Close()
	_ = p.process.Wait()
	if p.reserved != nil {
		_ = p.reserved.Close()
	}
}

// isPeer runs the peer if this process was started as one, and reports whether it was.
func isPeer() bool {
	spec := os.Getenv(peerVariable)
	if spec == "" {
		return false
	}
	if err := runPeer(spec); err != nil {
		fatal(err)
	}
	return true
}

// runPeer is the peer's process. It ends at the end of its standard input.
func runPeer(text string) error {
	var spec peerSpec
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		return err
	}
	orders := make(chan string)
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			orders <- in.Text()
		}
		os.Exit(0)
	}()
	send, err := connectPeer(spec)
	if err != nil {
		return err
	}
	answers := json.NewEncoder(os.Stdout)
	for line := range orders {
		r, err := obey(send, line)
		if err != nil {
			return err
		}
		r.CPU = cpuTime()
		if err := answers.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

// sendFunc sends n messages. A rate that is not 0 limits it, in messages a second; only
// then it returns their latencies.
type sendFunc func(n int, rate float64) (latency []time.Duration, err error)

// connectPeer writes its address if it listens, and returns when the sessions are open.
func connectPeer(spec peerSpec) (sendFunc, error) {
	switch {
	case spec.Protocol == speaksPlain || spec.Protocol == speaksGathered:
		l, err := listenLoop(spec.Protocol == speaksGathered)
		if err != nil {
			return nil, err
		}
		do := l.run(spec, spec.Source)
		return func(n int, _ float64) ([]time.Duration, error) { return nil, do(n) }, nil
	case spec.Dial != "":
		sessions, err := dialSessions(spec)
		return sessions.send, err
	default:
		sessions, err := acceptSession(spec)
		return sessions.send, err
	}
}

func obey(send sendFunc, line string) (r report, err error) {
	n, rate := 0, 0.0
	order, rest, _ := strings.Cut(line, " ")
	switch order {
	case "report":
		return r, nil
	case "send":
		_, err = fmt.Sscanf(rest, "%d", &n)
	case "pace":
		_, err = fmt.Sscanf(rest, "%d %g", &n, &rate)
	default:
		err = errors.New("unknown command")
	}
	if err != nil {
		return r, fmt.Errorf("command %q: %w", line, err)
	}
	r.Latency, err = send(n, rate)
	return r, err
}

// acceptSession listens, writes its address, and waits for the session.
func acceptSession(spec peerSpec) (sessions, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer func() { _ = l.Close() }()
	fmt.Println(l.Addr())
	conn, err := l.Accept()
	if err != nil {
		return nil, err
	}
	s, err := newSession(spec, conn, 0)
	return sessions{s}, err
}

// dialSessions dials until the subject listens.
func dialSessions(spec peerSpec) (all sessions, err error) {
	fmt.Println("-")
	for id := range spec.Sessions {
		var conn net.Conn
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if conn, err = net.Dial("tcp", spec.Dial); err == nil {
				break
			}
			if time.Now().After(deadline) {
				return nil, err
			}
		}
		s, err := newSession(spec, conn, uint64(id)+1)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}
