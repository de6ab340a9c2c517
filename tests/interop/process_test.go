package interop_test

import (
	"bufio"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// process is a program that the test started, with the lines that it has
// written and nobody has taken yet.
type process struct {
	t     *testing.T
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser

	mu      sync.Mutex
	lines   []string // not taken
	log     []string // all of standard error, and the last of standard output
	changed chan struct{}
	exited  chan struct{} // closed when it has ended and all lines are there
	code    int
}

const keptLines = 60

func start(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, name: name, cmd: cmd, changed: make(chan struct{}), exited: make(chan struct{})}
	var err error
	p.stdin, err = cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())

	var reading sync.WaitGroup
	for _, pipe := range []io.Reader{stdout, stderr} {
		reading.Go(func() { p.read(pipe) })
	}
	go func() {
		reading.Wait()
		_ = cmd.Wait() // the code says it
		p.mu.Lock()
		p.code = cmd.ProcessState.ExitCode()
		p.mu.Unlock()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			p.mu.Lock()
			defer p.mu.Unlock()
			t.Logf("%s wrote:\n  %s", p.name, strings.Join(p.log, "\n  "))
		}
	})
	return p
}

func (p *process) read(pipe io.Reader) {
	lines := bufio.NewReader(pipe)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			p.mu.Lock()
			line = strings.TrimSuffix(line, "\n")
			p.lines = append(p.lines, line)
			if p.log = append(p.log, line[:min(len(line), 500)]); len(p.log) > keptLines {
				p.log = p.log[1:]
			}
			close(p.changed)
			p.changed = make(chan struct{})
			p.mu.Unlock()
		}
		if err != nil {
			return
		}
	}
}

// take waits for a line that suits, and takes it away.
func (p *process) take(what string, suits func(line string) bool) string {
	p.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	ended := false
	for {
		p.mu.Lock()
		if i := slices.IndexFunc(p.lines, suits); i >= 0 {
			line := p.lines[i]
			p.lines = slices.Delete(p.lines, i, i+1)
			p.mu.Unlock()
			return line
		}
		changed := p.changed
		p.mu.Unlock()
		require.False(p.t, ended, "%s has ended with code %d without: %s", p.name, p.code, what)
		select {
		case <-changed:
		case <-p.exited:
			ended = true // look once more
		case <-deadline.C:
			require.FailNow(p.t, "nothing came", "from %s: %s", p.name, what)
		}
	}
}

// count tells how many lines suit that nobody has taken.
func (p *process) count(suits func(line string) bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, line := range p.lines {
		if suits(line) {
			n++
		}
	}
	return n
}

// drop takes away all lines that suit.
func (p *process) drop(suits func(line string) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = slices.DeleteFunc(p.lines, suits)
}

// wantExit waits for the end.
func (p *process) wantExit(code int) {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		require.FailNow(p.t, "still there", "%s should have ended", p.name)
	}
	require.Equal(p.t, code, p.code, "the exit code of %s", p.name)
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill ends the process without ceremony.
func (p *process) kill() {
	if p.running() {
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}
