//go:build linux

package chaos

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fault is one fault at one place. inject begins it, waits, and ends it.
type fault struct {
	kind, place string
	route       *process // whose route must have units in flight
	inject      func() error
}

// faultKinds makes a fault of each kind, at a random place.
var faultKinds = []struct {
	kind string
	make func(w *world, random *rand.Rand) fault
}{
	{"line cut", onLine((*line).cut)},
	{"line reset", onLine((*line).reset)},
	{"line half-open, only the client is notified", onLine(func(l *line) int { return l.halfOpen(true) })},
	{"line half-open, only the server is notified", onLine(func(l *line) int { return l.halfOpen(false) })},
	{"line is a black hole", onLine((*line).blackHole)},
	{"line slow", func(w *world, random *rand.Rand) fault {
		l, rate, lasts := pick(random, w.allLines()), 5000+random.Int64N(30_000), seconds(random, 2, 5)
		return fault{place: l.name, route: w.routeOf(l), inject: func() error {
			l.rate.Store(rate)
			time.Sleep(lasts)
			l.rate.Store(0)
			return nil
		}}
	}},
	{"line down", func(w *world, random *rand.Rand) fault {
		return down(w, pick(random, w.allLines()), random)
	}},
	{"SIGKILL", restart(syscall.SIGKILL)},
	{"SIGTERM", restart(syscall.SIGTERM)},
	{"SIGSTOP", onProcess(func(w *world, p *process, random *rand.Rand) error {
		return stopped([]*process{p}, seconds(random, 0.2, 5))
	})},
	{"suspended machine (SIGSTOP of all)", func(w *world, random *rand.Rand) fault {
		lasts := seconds(random, 1, 4)
		return fault{place: "all processes", route: w.bridge, inject: func() error {
			all := w.processes()
			defer locked(all...)()
			return stopped(all, lasts)
		}}
	}},
	{"reload", onProcess(func(w *world, p *process, random *rand.Rand) error {
		err := p.configure(p.config())
		time.Sleep(seconds(random, 0.5, 1.5))
		return err
	})},
	{"bad file", onProcess(func(w *world, p *process, random *rand.Rand) error {
		good := p.config()
		err := p.configure(pick(random, []string{
			"{ input: [", good[:len(good)*2/3], "# empty\n", good + "\nunknown: {}\n", good + "\ninput: { cryo_server: { address: x } }\n",
		}))
		time.Sleep(seconds(random, 0.5, 1.5))
		return errors.Join(err, p.configure(p.config()))
	})},
	{"disk full (RLIMIT_FSIZE)", func(w *world, random *rand.Rand) fault {
		p, s := w.collector, w.collected
		if random.IntN(2) == 0 {
			p, s = w.journal, w.written
		}
		lasts, left := seconds(random, 1, 3), random.Int64N(2000)
		return fault{place: p.name, route: p, inject: func() error {
			defer locked(p)()
			info, err := os.Stat(s.path)
			if err != nil {
				return err
			}
			return limited(p, unix.RLIMIT_FSIZE, uint64(info.Size()+left), func() { time.Sleep(lasts) })
		}}
	}},
	{"no descriptors (RLIMIT_NOFILE)", onProcess(func(w *world, p *process, random *rand.Rand) error {
		return limited(p, unix.RLIMIT_NOFILE, 3, func() {
			for _, l := range w.linesOf(p) {
				l.cut() // so that connections are needed
			}
			time.Sleep(seconds(random, 0.5, 3))
		})
	})},
	{"Kafka down", func(w *world, random *rand.Rand) fault {
		// The engine waits a minute if its first connection to Kafka is refused, so the
		// processes are not started meanwhile.
		f := down(w, w.lines.kafka, random)
		return fault{place: f.place, route: f.route, inject: func() error {
			defer locked(w.gateway, w.bridge)()
			return f.inject()
		}}
	}},
	{"token renewed", func(w *world, random *rand.Rand) fault {
		return fault{place: "all", route: w.bridge, inject: func() error { return w.renew(w.credentials.renewToken) }}
	}},
	{"certificate and authority renewed", func(w *world, random *rand.Rand) fault {
		return fault{place: "all", route: w.bridge, inject: func() error { return w.renew(w.credentials.renewCertificate) }}
	}},
}

// newFault makes a fault of a kind, which is an index of faultKinds.
func newFault(w *world, kind int, random *rand.Rand) fault {
	f := faultKinds[kind].make(w, random)
	f.kind = faultKinds[kind].kind
	return f
}

// onLine makes a fault of the connections that a line has.
func onLine(do func(l *line) int) func(w *world, random *rand.Rand) fault {
	return func(w *world, random *rand.Rand) fault {
		l := pick(random, w.allLines())
		return fault{place: l.name, route: w.routeOf(l), inject: func() error {
			do(l)
			return nil
		}}
	}
}

// down makes a fault that closes the connections of a line and refuses others. Each line has
// one at a time: there is one fault of this kind in a round, and one of Kafka.
func down(w *world, l *line, random *rand.Rand) fault {
	lasts := seconds(random, 0.5, 3)
	return fault{place: l.name, route: w.routeOf(l), inject: func() error {
		l.setDown()
		time.Sleep(lasts)
		return l.setUp()
	}}
}

// onProcess makes a fault of a process.
func onProcess(do func(w *world, p *process, random *rand.Rand) error) func(w *world, random *rand.Rand) fault {
	return func(w *world, random *rand.Rand) fault {
		p, own := pick(random, w.processes()), fork(random)
		return fault{place: p.name, route: p, inject: func() error {
			defer locked(p)()
			return do(w, p, own)
		}}
	}
}

// locked keeps other faults away from processes, which are in the order of world.processes.
func locked(processes ...*process) (unlock func()) {
	for _, p := range processes {
		p.faulty.Lock()
	}
	return func() {
		for _, p := range processes {
			p.faulty.Unlock()
		}
	}
}

// restart ends a process, and starts it again after a while.
func restart(signal syscall.Signal) func(w *world, random *rand.Rand) fault {
	return onProcess(func(w *world, p *process, random *rand.Rand) error {
		if signal != syscall.SIGKILL {
			if err := p.awaitLaunch(); err != nil {
				return err
			}
		}
		code, err := p.stop(signal)
		if err == nil && signal != syscall.SIGKILL && code != 0 {
			err = fmt.Errorf("exit code %d of %s after %v", code, p.name, signal)
		}
		time.Sleep(seconds(random, 0, 1))
		p.restarts.Add(1)
		return errors.Join(err, p.start(), p.awaitLaunch())
	})
}

// stopped stops processes, and continues them after a while.
func stopped(processes []*process, lasts time.Duration) error {
	var errs []error
	for _, p := range processes {
		errs = append(errs, p.signal(syscall.SIGSTOP))
	}
	time.Sleep(lasts)
	for _, p := range processes {
		errs = append(errs, p.signal(syscall.SIGCONT))
	}
	return errors.Join(errs...)
}

// limited runs f while a process has a lower limit.
func limited(p *process, resource int, value uint64, f func()) error {
	restore, err := p.limit(resource, value)
	if err != nil {
		return err
	}
	f()
	return restore()
}

// filesInterval is more than the time between two reads of a listener's files.
const filesInterval = 1500 * time.Millisecond

// renew renews credentials in two steps, and cuts all lines, so that the new ones are needed.
// A client with a token that its server has not read yet would be denied, and wait for 30 s.
func (w *world) renew(renew func(between func()) error) error {
	err := renew(func() { time.Sleep(filesInterval) })
	for _, l := range w.allLines() {
		l.cut()
	}
	return err
}

// routeOf returns the process whose route a line is part of.
func (w *world) routeOf(l *line) *process {
	return map[*line]*process{
		w.lines.gateway: w.gateway, w.lines.kafka: w.gateway, w.lines.relayIn: w.relay, w.lines.relayOut: w.relay, w.lines.journal: w.journal,
	}[l]
}

func pick[T any](random *rand.Rand, from []T) T { return from[random.IntN(len(from))] }

// seconds returns a random duration.
func seconds(random *rand.Rand, from, to float64) time.Duration {
	return time.Duration((from + (to-from)*random.Float64()) * float64(time.Second))
}
