package tests

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// resender sends messages until each is acknowledged, on whatever session there
// is, as an application would.
type resender struct {
	mu       sync.Mutex
	todo     []string
	acked    []string
	sends    int
	progress chan struct{}      // closed and replaced with each acknowledgement
	session  *cryo.Session      // the newest; nil before the first
	came     chan struct{}      // closed and replaced with each session
	stop     context.CancelFunc // ends the workers
	working  sync.WaitGroup
}

func newResender(server *server, texts []string, workers int) *resender {
	r := &resender{todo: slices.Clone(texts), progress: make(chan struct{}), came: make(chan struct{})}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	r.working.Go(func() {
		for {
			select {
			case s := <-server.sessions:
				r.mu.Lock()
				r.session = s
				close(r.came)
				r.came = make(chan struct{})
				r.mu.Unlock()
			case <-ctx.Done():
				return
			}
		}
	})
	for range workers {
		r.working.Go(func() { r.work(ctx) })
	}
	return r
}

func (r *resender) work(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		if len(r.todo) == 0 {
			r.mu.Unlock()
			return
		}
		text := r.todo[0]
		r.todo = r.todo[1:]
		session, came := r.session, r.came
		if session != nil {
			r.sends++
		}
		r.mu.Unlock()

		err := fmt.Errorf("nobody is connected")
		if session != nil {
			err = session.SendUTF8(ctx, text)
		}
		r.mu.Lock()
		if err == nil {
			r.acked = append(r.acked, text)
			close(r.progress)
			r.progress = make(chan struct{})
		} else {
			r.todo = append(r.todo, text)
		}
		another := r.session != session
		r.mu.Unlock()
		if err != nil && !another {
			select {
			case <-came:
			case <-ctx.Done():
			}
		}
	}
}

// acknowledged gives what is acknowledged by now.
func (r *resender) acknowledged() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.acked)
}

// wait waits until so many are acknowledged.
func (r *resender) wait(t *testing.T, n int) {
	t.Helper()
	deadline := time.After(patience)
	for {
		r.mu.Lock()
		acked, progress := len(r.acked), r.progress
		r.mu.Unlock()
		if acked >= n {
			return
		}
		select {
		case <-progress:
		case <-deadline:
			require.FailNow(t, "too few are acknowledged", "%d of %d", acked, n)
		}
	}
}

var numberedPattern = regexp.MustCompile(`m-\d{6}`)

// inFile gives the messages in a file, and how often each is there. A kill may
// leave half a message, or no newline behind one.
func inFile(t *testing.T, path string) map[string]int {
	t.Helper()
	content, err := os.ReadFile(path)
	if !os.IsNotExist(err) {
		require.NoError(t, err)
	}
	found := make(map[string]int)
	for _, text := range numberedPattern.FindAllString(string(content), -1) {
		found[text]++
	}
	return found
}

func TestNoMessageIsLostHoweverOftenTheProcessIsKilled(t *testing.T) {
	const kills = 10
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	server := serve(t)
	path := filepath.Join(t.TempDir(), "messages.txt")
	config := filepath.Join(t.TempDir(), "receive.yaml")
	require.NoError(t, os.WriteFile(config, []byte(`
http: { enabled: false }
input:
  cryo: { url: `+server.url()+`, token: `+token+` }
output:
  file: { path: `+path+`, codec: lines }
`), 0o600))

	texts := numbered(20_000)
	r := newResender(server, texts, 256)
	defer func() { r.stop(); r.working.Wait() }()
	wantInFile := func(acked []string) {
		t.Helper()
		found := inFile(t, path)
		for _, text := range acked {
			require.Positive(t, found[text], "%s was acknowledged, and is not in the file", text)
		}
	}
	for range kills {
		p := launch(t, nil, nil, "run", config)
		r.wait(t, len(r.acknowledged())+random.IntN(len(texts)/kills))
		time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond) // the moment's chance, not a wait for anything
		p.kill()
		wantInFile(r.acknowledged())
	}
	p := launch(t, nil, nil, "run", config)
	r.wait(t, len(texts))
	p.interrupt()

	found := inFile(t, path)
	again := 0
	for _, text := range texts {
		require.Positive(t, found[text], "%s is not in the file", text)
		again += found[text] - 1
	}
	t.Logf("%d messages, %d sends, %d delivered more than once", len(texts), r.sends, again)
	require.Greater(t, r.sends, len(texts), "some had to be sent again, or this has tested nothing")
}
