package main

import (
	"os"
	"os/signal"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
)

// The engine may not notice the second of two signals that arrive together, and then still waits
// for the whole delay: its pipelines run, and their sends must not be cancelled.
func TestSendsAreNotCancelledDuringTheShutdownDelay(t *testing.T) {
	for name, c := range map[string]struct {
		after []time.Duration // times of the signals after the first one
		want  time.Duration
	}{
		"one signal":                   {nil, 65 * time.Second},
		"two signals together":         {[]time.Duration{0}, 65 * time.Second},
		"three signals together":       {[]time.Duration{0, 0}, 65 * time.Second},
		"another one ends the delay":   {[]time.Duration{10 * time.Second}, 15 * time.Second},
		"the third one ends the delay": {[]time.Duration{0, 10 * time.Second}, 15 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := stopper{delay: time.Minute, timeout: 20 * time.Second}
				signals := make(chan os.Signal, 2)
				begin, cancelled := time.Now(), make(chan time.Duration, 1)
				go func() {
					s.awaitTimeout(signals)
					cancelled <- time.Since(begin)
				}()
				for _, at := range c.after {
					time.Sleep(time.Until(begin.Add(at)))
					select {
					case signals <- syscall.SIGTERM:
					default: // as package signal does
					}
				}
				require.Equal(t, c.want, <-cancelled)
			})
		})
	}
}

// Between the start of the pipelines and the engine's own handling of signals, one that is only
// noticed here would neither end the process nor stop it.
func TestSignalBeforeTheEngineHandlesThemIsNotLost(t *testing.T) {
	s := stopper{resources: service.MockResources()}
	require.NoError(t, s.watch(nil))
	self, err := os.FindProcess(os.Getpid())
	require.NoError(t, err)
	require.NoError(t, self.Signal(syscall.SIGTERM))
	time.Sleep(10 * time.Millisecond)
	engine := make(chan os.Signal, 1)
	signal.Notify(engine, syscall.SIGTERM)
	defer signal.Stop(engine)
	select {
	case <-engine:
	case <-time.After(5 * time.Second):
		t.Fatal("the signal is lost")
	}
}
