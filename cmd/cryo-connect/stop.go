package main

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/plugin"
)

// ackFraction is the part of shutdown_timeout in which servers may acknowledge what was sent to
// them. The engine waits for three quarters of it, without telling the outputs.
const ackFraction = 4

// stopper cancels the sends of the outputs cryo when the process stops.
type stopper struct {
	resources      *service.Resources
	delay, timeout time.Duration // shutdown_delay and shutdown_timeout
}

// configure reads the configuration, before any pipeline is made.
func (s *stopper) configure(conf *service.ParsedConfig) (err error) {
	s.resources = conf.Resources()
	if s.delay, err = durationOf(conf, "shutdown_delay"); err == nil {
		s.timeout, err = durationOf(conf, "shutdown_timeout")
	}
	return err
}

// durationOf returns the value of a field of the engine, which takes an empty one for 0.
func durationOf(conf *service.ParsedConfig, field string) (time.Duration, error) {
	if text, err := conf.FieldString(field); err != nil || text == "" {
		return 0, err
	}
	return conf.FieldDuration(field)
}

// engineTime is more than the engine needs from the start of the pipelines until it handles
// signals, and from the first signal until it notices another one.
const engineTime = 100 * time.Millisecond

// watch waits for the signals that stop the process, in the background. The engine calls it when
// the pipelines have started, immediately before it handles these signals itself: until then a
// signal ends the process.
func (s *stopper) watch(*service.RunningStreamSummary) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	began := time.Now()
	go func() {
		first := <-signals
		if time.Since(began) < engineTime { // the engine may have missed it
			time.Sleep(engineTime)
			repeatSignal(first)
			<-signals // if the system can't repeat it, the next one
		}
		s.awaitTimeout(signals)
		plugin.CancelSends(s.resources)
	}()
	return nil
}

// repeatSignal sends a signal to this process, if the system can do that. If the engine has handled
// it before, that ends the delay.
func repeatSignal(s os.Signal) {
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Signal(s)
	}
}

// awaitTimeout returns when the sends are to be cancelled. It is called at the first signal.
func (s *stopper) awaitTimeout(signals <-chan os.Signal) {
	began, delay := time.Now(), time.After(s.delay)
	for waiting := true; waiting; {
		select {
		case <-delay:
			waiting = false
		case <-signals: // ends the delay, unless the engine may have missed it
			waiting = time.Since(began) < engineTime
		}
	}
	time.Sleep(s.timeout / ackFraction)
}
