package main

import (
	"runtime"
	"slices"
	"time"

	"github.com/urfave/cli/v2"
)

// flagWatcher is the engine's flag -w of the commands run and streams.
const flagWatcher = "watcher"

// collectInterval is the maximum time between two runs of the garbage collector with -w. The time of the last
// run is not considered: it is one of the system's clock, which can change.
const collectInterval = 5 * time.Second

// fileWatcher makes the engine's -w notice a file that was replaced by renaming another, as editors and
// Kubernetes do. The engine does not close a configuration file that it has read; the garbage
// collector does. Until then the system keeps the old file, on which the engine waits, and reports
// nothing about it. An idle process collects only every two minutes.
type fileWatcher struct {
	requested bool // by -w
}

// readFlags reads -w, which may precede the command.
func (w *fileWatcher) readFlags(c *cli.Context) {
	w.requested = slices.ContainsFunc(c.Lineage(), func(c *cli.Context) bool { return c.Bool(flagWatcher) })
}

// start runs the garbage collector in the background.
func (w *fileWatcher) start() {
	if !w.requested {
		return
	}
	go func() {
		for range time.Tick(collectInterval) {
			runtime.GC()
		}
	}()
}
