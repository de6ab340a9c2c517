package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The components of a process that have the same address share a listener and its sessions.

// listeners holds the listeners of an engine by their addresses.
type listeners struct {
	listen func(network, address string) (net.Listener, error)

	mu     sync.Mutex
	keeps  bool // whether listeners without components wait for others; see KeepListeners
	byAddr map[string]*listener
	tested map[string]*testedAddress // by address
}

// testedAddress is an address that was tested.
type testedAddress struct {
	first *serverComponent // the first component with the address
	addr  net.Addr         // the address of its socket; nil if it could not listen
}

// listenersKey is the key of the listeners in the engine's resources, which all pipelines of a
// process share.
type listenersKey struct{}

func newListeners(listen func(network, address string) (net.Listener, error)) *listeners {
	return &listeners{listen: listen, byAddr: make(map[string]*listener), tested: make(map[string]*testedAddress)}
}

func listenersOf(res *service.Resources) *listeners {
	all, _ := res.GetOrSetGeneric(listenersKey{}, newListeners(net.Listen))
	return all.(*listeners)
}

// open adds a component to the listener on its address. The first component starts the
// listener. If an earlier listener on the address is starting or closing, open waits for it.
func (l *listeners) open(ctx context.Context, c *serverComponent) (*listener, error) {
	for {
		ln, closing, err := l.join(c)
		if closing == nil {
			return ln, err
		}
		select {
		case <-closing:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (l *listeners) join(c *serverComponent) (ln *listener, closing <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	address := c.settings.Address
	ln = l.byAddr[address]
	if ln == nil {
		if ln, err = l.start(c); errors.Is(err, syscall.EADDRINUSE) {
			if other := l.closingOnPort(address); other != nil {
				return nil, other.closed, nil
			}
			err = l.explainInUse(err)
		}
		return ln, nil, err
	}
	if len(ln.users) == 0 {
		if l.adopt(ln, c) {
			return ln, nil, nil
		}
		return nil, ln.closed, nil
	}
	if err = ln.users[0].checkSettings(c); err != nil {
		return nil, nil, err
	}
	ln.users = append(ln.users, c)
	return ln, nil, nil
}

// start starts a listener for its first component. The mutex must be held. It is released while
// the socket is opened, because resolving the address may take a long time. In the meantime,
// other components with the address wait, as they do for a listener that closes.
func (l *listeners) start(c *serverComponent) (*listener, error) {
	address := c.settings.Address
	starting := &listener{closed: make(chan struct{})}
	l.byAddr[address] = starting
	l.mu.Unlock()
	ln, err := newListener(c, l.listen)
	l.mu.Lock()
	close(starting.closed)
	if err != nil {
		delete(l.byAddr, address)
		return nil, err
	}
	l.byAddr[address] = ln
	delete(l.tested, address)
	return ln, nil
}

// test returns an error if a component cannot listen. If another component of this process
// listens on the address, or was tested before, their settings must be equal.
func (l *listeners) test(c *serverComponent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	address := c.settings.Address
	if ln := l.byAddr[address]; ln != nil {
		if len(ln.users) == 0 {
			return nil
		}
		return ln.users[0].checkSettings(c)
	}
	tested := l.tested[address]
	if tested == nil {
		tested = &testedAddress{first: c}
		l.tested[address] = tested
	} else if err := tested.first.checkSettings(c); err != nil {
		return err
	}
	if _, err := c.settings.tlsSettings.watch(0, c.log); err != nil {
		return err
	}
	socket, err := l.listen("tcp", address)
	if err != nil {
		return l.explainInUse(withListenHint(err))
	}
	tested.addr = socket.Addr()
	for _, other := range l.tested {
		if other != tested && other.addr != nil && other.addr.String() == tested.addr.String() {
			err = sharedInUse(syscall.EADDRINUSE, other.first)
		}
	}
	return errors.Join(err, socket.Close())
}

// explainInUse adds to the error of an address in use which component of this process listens there, if one
// does: byAddr has addresses as they are written, and one socket may have several spellings. The mutex must
// be held.
func (l *listeners) explainInUse(err error) error {
	op, ok := errors.AsType[*net.OpError](err)
	if !ok || !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	for _, ln := range l.byAddr {
		if len(ln.users) > 0 && overlap(ln.socketAddr(), op.Addr) {
			return sharedInUse(op, ln.users[0])
		}
	}
	return err
}

// sharedInUse is the error of an address that another component of this process uses in another spelling.
func sharedInUse(err error, other *serverComponent) error {
	return fmt.Errorf("field %s: %w: %s listens there, as %s: write the address the same way in both components to share the listener, or use another port",
		fieldAddress, err, other.name, other.settings.Address)
}

// overlap reports whether a socket on one of these addresses prevents one on the other.
func overlap(a, b net.Addr) bool {
	x, ok := a.(*net.TCPAddr)
	y, also := b.(*net.TCPAddr)
	return ok && also && x.Port == y.Port && (x.IP.Equal(y.IP) || isWildcard(x.IP) || isWildcard(y.IP))
}

func isWildcard(ip net.IP) bool { return len(ip) == 0 || ip.IsUnspecified() }

// leave removes a component from its listener. in is its receiving half, or nil for an output.
// The listener closes after the last component has left. Otherwise, the first of the remaining
// components authorizes its clients and reports its metrics.
func (l *listeners) leave(ctx context.Context, ln *listener, c *serverComponent, in *receiver) error {
	l.mu.Lock()
	ln.users = slices.DeleteFunc(ln.users, func(user *serverComponent) bool { return user == c })
	last := len(ln.users) == 0
	keep := last && l.keeps
	if keep {
		l.keep(ln) // before the messages of in are handed over: an input that adopts the listener meanwhile gets them
	}
	if last {
		ln.authorizeWith(nil)
	} else {
		ln.authorizeWith(ln.users[0])
		ln.metrics.reportAs(ln.users[0].meter)
	}
	l.mu.Unlock()
	if in != nil {
		ln.inputs.remove(in, last && !keep)
	}
	if !last || keep {
		return nil
	}
	return l.close(ctx, ln)
}

// close closes a listener without components, and makes its address available.
func (l *listeners) close(ctx context.Context, ln *listener) error {
	err := ln.close(ctx)
	l.mu.Lock()
	delete(l.byAddr, ln.settings.Address)
	l.mu.Unlock()
	close(ln.closed)
	return err
}

// serverComponent is the part of a cryo_server input or output that uses a listener.
type serverComponent struct {
	name      string // the kind, the label or path, and the stream of the component, for errors
	log       *service.Logger
	meter     meter // for the metrics of the listener
	listeners *listeners
	settings  listenSettings
	authorize func(*cryo.Upgrade) error
	listener  *listener // nil before the first Connect and after Close

	processors authorizeProcessors // of authorize
}

func serverComponentFromParsed(conf *service.ParsedConfig, res *service.Resources, kind string) (*serverComponent, error) {
	c := &serverComponent{name: kind + " cryo_server", log: res.Logger(), meter: meterOf(res), listeners: listenersOf(res)}
	if label := res.Label(); label != "" {
		c.name += " " + label
	} else {
		c.name += " at " + strings.Join(res.Path(), ".")
	}
	if stream := res.StreamID(); stream != "" {
		c.name += " of the stream " + stream
	}
	var err error
	c.settings, c.authorize, err = listenSettingsFromParsed(conf, &c.processors, c.log)
	return c, err
}

// checkSettings returns an error if the settings of another component with the same address
// differ from those of c.
func (c *serverComponent) checkSettings(other *serverComponent) error {
	different := c.settings.differences(other.settings)
	if len(different) == 0 {
		return nil
	}
	return fmt.Errorf("%s and %s share the listener on %s, but differ in %s: make these fields equal, or use different addresses",
		c.name, other.name, c.settings.Address, strings.Join(different, ", "))
}

// open joins the listener on the first call. Later calls return an error while the listener is down.
// joined reports whether this call joined it.
func (c *serverComponent) open(ctx context.Context) (joined bool, err error) {
	if c.listener != nil {
		return false, c.listener.downError()
	}
	c.listener, err = c.listeners.open(ctx, c)
	return err == nil, err
}

// ConnectionTest loads the TLS files, and opens and closes the socket. If the address is in use
// by a listener of this process, it only compares the settings.
func (c *serverComponent) ConnectionTest(context.Context) service.ConnectionTestResults {
	if err := c.listeners.test(c); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	return service.ConnectionTestSucceeded().AsList()
}

// leave leaves the listener, if the component has joined it, and closes the processors of
// authorize. in is the receiving half of an input, or nil for an output.
func (c *serverComponent) leave(ctx context.Context, in *receiver) error {
	var err error
	if joined := c.listener; joined != nil {
		c.listener = nil
		err = c.listeners.leave(ctx, joined, c, in)
	}
	return errors.Join(err, c.processors.close(ctx))
}
