package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/network"
	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// The processors that run before the mapping authorize, such as a request to a service.

const (
	fieldAuthorizeProcessors = "authorize_processors"

	// maxAuthorizing bounds the clients of a listener for which processors run at the same time.
	// They need no valid token for that, so those of one address have at most as many runs as are
	// free for others: the first address half, the next one a quarter. It takes at least nine
	// addresses to use all runs, and a client of another address then has the next one that ends.
	maxAuthorizing = 256
)

func authorizeProcessorsField() *service.ConfigField {
	return service.NewProcessorListField(fieldAuthorizeProcessors).
		Description("Processors that run for each client before `authorize`, such as `http` or `cache`; `authorize` is then required. They receive the input of `authorize`, and their result is `this.answer` there. If they fail, or do not finish within `" + fieldHandshakeTimeout + "`, the client is denied with status 503: see [Processors](" + authorizationPage + "#processors).").
		Default([]any{}).
		Example([]any{
			map[string]any{"http": map[string]any{"url": "http://accounts:8000/authorize", "verb": "POST", "timeout": "3s", "retries": 0}},
		}).
		Advanced()
}

// authorizeProcessors are the processors of one component, which builds and closes them. A listener
// runs those of its first component, until that leaves.
type authorizeProcessors struct {
	timeout time.Duration             // of one run
	slots   *quota.Quota              // one per run
	list    []*service.OwnedProcessor // empty before build
	running sync.WaitGroup            // authorizations of the listener that use this component, see listener.authorize, and runs

	mu       sync.Mutex
	networks map[netip.Prefix]*networkSlots // those of clients that have a slot or wait for one; guarded by mu
}

// networkSlots are the slots of the clients of one network.
type networkSlots struct {
	*quota.Share
	clients int // that have a slot or wait for one; guarded by authorizeProcessors.mu
}

// readProcessorsSource returns the configuration of the processors, for comparison only, because
// it may contain secrets.
func readProcessorsSource(r *settingsReader) (source []any) {
	if r.err != nil {
		return nil
	}
	raw, err := r.conf.FieldAny(fieldAuthorizeProcessors)
	if err != nil {
		r.err = err
		return nil
	}
	text, err := yaml.Marshal(raw) // the elements are of types of the engine
	if err == nil {
		err = yaml.Unmarshal(text, &source)
	}
	for i, processor := range source { // the engine's lint does not report such an element
		if object, ok := processor.(map[string]any); err == nil && (!ok || len(object) == 0) {
			err = fmt.Errorf("processor %d must be an object such as { mapping: root = this }", i)
		}
	}
	if err != nil {
		r.err = fmt.Errorf("field %s: %w", fieldAuthorizeProcessors, err)
	}
	return source
}

// build builds the processors. It is a separate step because lint builds components without
// closing them, and processors may open connections.
func (p *authorizeProcessors) build(conf *service.ParsedConfig, timeout time.Duration) (err error) {
	p.timeout, p.slots = timeout, quota.New(maxAuthorizing, func(held, free int64) bool { return held < free })
	p.networks = make(map[netip.Prefix]*networkSlots)
	if p.list, err = conf.FieldProcessorList(fieldAuthorizeProcessors); err != nil {
		return fmt.Errorf("field %s: %w", fieldAuthorizeProcessors, err)
	}
	return nil
}

// run runs the processors, if there are any, for a client, and adds their answer to the client's
// description. It must not be called after close.
func (p *authorizeProcessors) run(ctx context.Context, client map[string]any) error {
	if len(p.list) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	release, err := p.acquire(ctx, client["remote_address"].(string))
	if err != nil {
		return notNow(fmt.Sprintf("%s are running for too many other clients", fieldAuthorizeProcessors))
	}
	m := service.NewMessage(nil)
	m.SetStructured(maps.Clone(client)) // the answer may be the same object
	batches, err := p.process(ctx, m, release)
	if err != nil {
		return processorsFailed(ctx, err)
	}
	var results service.MessageBatch
	for _, batch := range batches {
		results = append(results, batch...)
	}
	switch len(results) {
	case 0:
		return fmt.Errorf("denied by the processors of the field %s, which deleted the message", fieldAuthorizeProcessors)
	case 1:
		err = results[0].GetError()
	default:
		return notNow(fmt.Sprintf("%s returned %d messages, but must return one", fieldAuthorizeProcessors, len(results)))
	}
	if err != nil {
		return processorsFailed(ctx, err)
	}
	answer, err := results[0].AsStructured()
	if err != nil { // not JSON
		var text []byte
		if text, err = results[0].AsBytes(); err != nil {
			return processorsFailed(ctx, err)
		}
		answer = string(text)
	}
	client["answer"] = answer
	return nil
}

// acquire waits for a slot for the client of an address.
func (p *authorizeProcessors) acquire(ctx context.Context, address string) (release func(), err error) {
	peer := network.Of(address)
	p.mu.Lock()
	slots := p.networks[peer]
	if slots == nil {
		slots = &networkSlots{Share: p.slots.Share()}
		p.networks[peer] = slots
	}
	slots.clients++
	p.mu.Unlock()
	leave := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if slots.clients--; slots.clients == 0 {
			delete(p.networks, peer)
		}
	}
	if _, err := slots.AcquireUpTo(ctx, 1); err != nil {
		leave()
		return nil, err
	}
	return func() {
		slots.Release(1)
		leave()
	}, nil
}

// process runs the processors on a message, and calls release. It does not wait for processors that
// ignore the context: they keep their slot until they return.
func (p *authorizeProcessors) process(ctx context.Context, m *service.Message, release func()) ([]service.MessageBatch, error) {
	type result struct {
		batches []service.MessageBatch
		err     error
	}
	results := make(chan result, 1)
	p.running.Go(func() {
		defer release()
		batches, err := runProcessors(ctx, p.list, m)
		results <- result{batches, err}
	})
	select {
	case r := <-results:
		return r.batches, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// runProcessors runs processors on a message.
func runProcessors(ctx context.Context, processors []*service.OwnedProcessor, m *service.Message) (batches []service.MessageBatch, err error) {
	defer catchPanic(&err)
	return service.ExecuteProcessors(ctx, processors, service.MessageBatch{m})
}

// httpStatus matches the status in an error of the engine's HTTP client.
var httpStatus = regexp.MustCompile(`unexpected response code \((\d{3})\)`)

// processorsFailed returns a redacted error of the processors, because the original may quote any
// part of the token, even decoded.
func processorsFailed(ctx context.Context, err error) error {
	why := "the error is redacted, because it may contain a part of the token"
	if panicked, ok := errors.AsType[*panicError](err); ok {
		why = "panic in " + panicked.where
	} else if ctx.Err() != nil {
		why = fmt.Sprintf("no result within %s, or the client has disconnected", fieldHandshakeTimeout)
	} else if network, ok := errors.AsType[*net.OpError](err); ok {
		why = network.Error()
	} else if status := httpStatus.FindStringSubmatch(err.Error()); status != nil {
		why = "HTTP status " + status[1]
	}
	return notNow(fmt.Sprintf("%s failed: %s", fieldAuthorizeProcessors, why))
}

// notNow returns an error that denies a client with 503: it is unknown whether the client is authorized.
func notNow(cause string) error {
	return fmt.Errorf("%s: %w", cause, &cryo.AdmissionError{
		StatusCode: http.StatusServiceUnavailable,
		Message:    "Clients cannot be authorized at the moment. Try again later.",
	})
}

// close closes the processors once the authorizations that use them have ended, which takes
// handshake_timeout at most unless processors ignore their context, or when the context is done.
// The component must have left its listener, so that none begins.
func (p *authorizeProcessors) close(ctx context.Context) error {
	if len(p.list) == 0 {
		return nil
	}
	done := make(chan struct{})
	go func() {
		p.running.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	var err error
	for _, processor := range p.list {
		err = errors.Join(err, processor.Close(ctx))
	}
	return err
}
