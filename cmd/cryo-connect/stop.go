package main

import (
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"reflect"
	"syscall"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/plugin"
)

// ackFraction is the part of shutdown_timeout in which servers may acknowledge messages sent to
// them. The engine waits for three quarters of it before it informs the outputs.
const ackFraction = 4

// exitTime is the time beyond shutdown_delay and shutdown_timeout in which a stopping process ends. The engine
// takes one second of it, and complete up to ten.
const exitTime = 15 * time.Second

// The engine's fields about a stop.
const (
	shutdownDelay   = "shutdown_delay"
	shutdownTimeout = "shutdown_timeout"
)

// stopper does what the engine does not when the process stops: /ready responds with 503, listeners close
// their sessions over time, and sends of the outputs cryo are cancelled.
type stopper struct {
	resources      *service.Resources
	delay, timeout time.Duration // shutdown_delay and shutdown_timeout
}

// configure reads the configuration, before any pipeline is made.
func (s *stopper) configure(conf *service.ParsedConfig) (err error) {
	s.resources = conf.Resources()
	if s.delay, err = durationOf(conf.FieldString, shutdownDelay); err == nil {
		s.timeout, err = durationOf(conf.FieldString, shutdownTimeout)
	}
	plugin.SetShutdownDelay(s.delay)
	return err
}

// durationOf returns the value of a field of the engine, which takes an empty one for 0, and accepts
// a negative one.
func durationOf(text func(path ...string) (string, error), field string) (d time.Duration, err error) {
	value, err := text(field)
	if err != nil || value == "" {
		return 0, err
	}
	if d, err = time.ParseDuration(value); err != nil {
		return 0, fmt.Errorf("field %s: %w", field, err)
	}
	if d < 0 {
		return 0, fmt.Errorf("field %s must not be negative, got %s", field, value)
	}
	return d, nil
}

// engineTime is more than the engine needs to handle signals once the pipelines have started.
const engineTime = 100 * time.Millisecond

// watch waits for the first signal that stops the process, in the background. The engine calls it
// when the pipelines have started, immediately before it handles these signals itself. Until then a
// signal ends the process, and must not be received here alone: so a stop within engineTime of the
// start has no time limit for sends but the engine's own.
//
// A second signal ends the engine's shutdown_delay, but not the one here, because the engine may
// miss it: sends must not be cancelled while the pipelines run.
//
// The process exits after exitTime at the latest, with code 1. The engine's own limit begins when the engine
// has logged the signal, which it never does if standard output is a pipe that nobody reads. Such an exit is
// safe, as a crash is: what has no result stays unacknowledged.
func (s *stopper) watch() {
	go func() {
		time.Sleep(engineTime)
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
		<-signals
		time.AfterFunc(s.delay+s.timeout+exitTime, func() { os.Exit(1) }) // first: everything below may log
		plugin.RefuseConfigurations()
		s.endReadiness()
		plugin.DrainListeners(s.resources)
		time.Sleep(s.delay + s.timeout/ackFraction)
		plugin.CancelSends(s.resources)
	}()
}

// complete closes the listeners that have been kept for a pipeline that did not follow, or because the
// stop came before watch could notice it. Call it when the engine has ended.
func (s *stopper) complete() {
	if s.resources != nil { // not set by commands that run no pipelines
		plugin.CloseListeners(s.resources)
	}
}

// endReadiness makes /ready respond with 503, so that a balancer selects another instance from the
// beginning of shutdown_delay on. The engine itself continues to respond with 200, and has no public
// function for it: the one that its components use is found by reflection, and if there is none, nothing
// changes.
func (s *stopper) endReadiness() {
	unwrap := reflect.ValueOf(s.resources.XUnwrapper()).MethodByName("Unwrap")
	if !unwrap.IsValid() || unwrap.Type().NumIn() != 0 || unwrap.Type().NumOut() != 1 {
		return
	}
	manager, ok := reflect.TypeAssert[interface {
		RegisterEndpoint(path, description string, handler http.HandlerFunc)
	}](unwrap.Call(nil)[0])
	if !ok {
		return
	}
	manager.RegisterEndpoint("/ready", "Returns 503, because the process is stopping.", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "The process is stopping.", http.StatusServiceUnavailable)
	})
}
