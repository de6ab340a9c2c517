package plugin

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Components of one process that have the same address share its listener and its sessions.

// listeners are the listeners of one engine by address.
type listeners struct {
	listen func(network, address string) (net.Listener, error)

	mu     sync.Mutex
	byAddr map[string]*listener
	tested map[string]*serverComponent // the first of each address
}

// listenersKey finds them in the engine's resources, so that pipelines of one
// process share them, and tests don't.
type listenersKey struct{}

func newListeners(listen func(network, address string) (net.Listener, error)) *listeners {
	return &listeners{listen: listen, byAddr: make(map[string]*listener), tested: make(map[string]*serverComponent)}
}

func listenersOf(res *service.Resources) *listeners {
	all, _ := res.GetOrSetGeneric(listenersKey{}, newListeners(net.Listen))
	return all.(*listeners)
}

// open returns the listener of an address, and starts it for the first component.
// It waits for one that is closing.
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
		if ln, err = newListener(c, l.listen); err != nil {
			return nil, nil, err
		}
		l.byAddr[address] = ln
		delete(l.tested, address)
		return ln, nil, nil
	}
	if len(ln.users) == 0 {
		return nil, ln.closed, nil
	}
	if err = ln.users[0].agree(c); err == nil && ln.isDown() {
		err = ln.start()
	}
	if err != nil {
		return nil, nil, err
	}
	ln.users = append(ln.users, c)
	return ln, nil, nil
}

// repair listens again if a listener is down.
func (l *listeners) repair(ln *listener) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !ln.isDown() {
		return nil
	}
	return ln.start()
}

// test returns why a component could not listen. An address on which another
// component of this process listens already is as good, if they agree; so they
// must where both are only tested.
func (l *listeners) test(c *serverComponent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	address := c.settings.Address
	if ln := l.byAddr[address]; ln != nil {
		if len(ln.users) == 0 {
			return nil
		}
		return ln.users[0].agree(c)
	}
	if first := l.tested[address]; first == nil {
		l.tested[address] = c
	} else if err := first.agree(c); err != nil {
		return err
	}
	if _, err := newTLSFiles(c.settings.tlsSettings, c.log); err != nil {
		return err
	}
	socket, err := l.listen("tcp", address)
	if err != nil {
		return withOpenFilesHint(err)
	}
	return socket.Close()
}

// leave takes a component off its listener; in is its receiving half, nil for an output.
// With the last component the listener closes. The first one of those that stay reports the
// listener's metrics from now on.
func (l *listeners) leave(ctx context.Context, ln *listener, c *serverComponent, in *receiver) error {
	l.mu.Lock()
	ln.users = slices.DeleteFunc(ln.users, func(user *serverComponent) bool { return user == c })
	last := len(ln.users) == 0
	if !last {
		ln.metrics.reportAs(ln.users[0].meter)
	}
	l.mu.Unlock()
	if in != nil {
		ln.inputs.remove(in, last)
	}
	if !last {
		return nil
	}
	err := ln.close(ctx)
	l.mu.Lock()
	delete(l.byAddr, c.settings.Address)
	l.mu.Unlock()
	close(ln.closed)
	return err
}

// serverComponent is an input's or output's part in a listener.
type serverComponent struct {
	name      string // for errors: its kind, its label or path, and its stream
	log       *service.Logger
	meter     meter // for the metrics of the listener
	all       *listeners
	settings  listenSettings
	authorize func(*cryo.Upgrade) error
	listener  *listener // nil before the first Connect and after Close
}

func serverComponentFromParsed(conf *service.ParsedConfig, res *service.Resources, kind string) (*serverComponent, error) {
	c := &serverComponent{name: kind + " cryo_server", log: res.Logger(), meter: meterOf(res), all: listenersOf(res)}
	if label := res.Label(); label != "" {
		c.name += " " + label
	} else {
		c.name += " at " + strings.Join(res.Path(), ".")
	}
	if stream := res.StreamID(); stream != "" {
		c.name += " of the stream " + stream
	}
	var err error
	c.settings, c.authorize, err = listenSettingsFromParsed(conf)
	return c, err
}

// agree returns in what another component of the same address differs from this one.
func (c *serverComponent) agree(other *serverComponent) error {
	different := c.settings.differences(other.settings)
	if len(different) == 0 {
		return nil
	}
	return fmt.Errorf("%s and %s share the listener on %s, but differ in %s: make that equal, or give one another address",
		c.name, other.name, c.settings.Address, strings.Join(different, ", "))
}

// open joins the listener once, however often the engine connects. Later it listens again where
// that has failed.
func (c *serverComponent) open(ctx context.Context) (fresh bool, err error) {
	if c.listener != nil {
		return false, c.all.repair(c.listener)
	}
	c.listener, err = c.all.open(ctx, c)
	return err == nil, err
}

// ConnectionTest reads the certificate, and listens for a moment.
func (c *serverComponent) ConnectionTest(context.Context) service.ConnectionTestResults {
	if err := c.all.test(c); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	return service.ConnectionTestSucceeded().AsList()
}

// leave leaves the listener, if it was joined; in is nil for an output.
func (c *serverComponent) leave(ctx context.Context, in *receiver) error {
	joined := c.listener
	if joined == nil {
		return nil
	}
	c.listener = nil
	return c.all.leave(ctx, joined, c, in)
}
