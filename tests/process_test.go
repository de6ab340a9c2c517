package tests

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// process is a running cryo-connect.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdout *lines
	stderr *lines
	ended  chan struct{}
	err    error // once it has ended
}

// launch starts cryo-connect. The test's end kills it, if it runs by then, and
// shows what it said if the test has failed.
func launch(t testing.TB, stdin io.Reader, env []string, args ...string) *process {
	t.Helper()
	return launchAs(t, stdin, env, binary, args...)
}

// launchAs starts a program that becomes cryo-connect, such as a shell that sets
// limits first.
func launchAs(t testing.TB, stdin io.Reader, env []string, program string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(program, args...), stdout: newLines(), stderr: newLines(), ended: make(chan struct{})}
	p.cmd.Dir = ".." // as the documentation has it
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdin = stdin
	stdout, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	stderr, err := p.cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	var reading sync.WaitGroup
	reading.Go(func() { p.stdout.read(stdout) })
	reading.Go(func() { p.stderr.read(stderr) })
	go func() {
		reading.Wait()
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("stdout of %v:\n%s", args, strings.Join(p.stdout.all(), "\n"))
			t.Logf("stderr of %v:\n%s", args, strings.Join(p.stderr.all(), "\n"))
		}
	})
	return p
}

// kill ends the process without any chance to clean up.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// interrupt is Ctrl-C. It wants the process to end, with exit code 0.
func (p *process) interrupt() {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGINT))
	p.wantSuccess()
}

// terminate is what a service manager does. It wants the process to end, with
// exit code 0.
func (p *process) terminate() {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGTERM))
	p.wantSuccess()
}

// wantSuccess wants the process to end by itself with exit code 0.
func (p *process) wantSuccess() {
	p.t.Helper()
	require.Zero(p.t, p.exitCode())
}

// exitCode waits for the end.
func (p *process) exitCode() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		require.FailNow(p.t, "the process goes on")
	}
	if exit, ok := errors.AsType[*exec.ExitError](p.err); ok {
		return exit.ExitCode()
	}
	require.NoError(p.t, p.err)
	return 0
}

// said is all lines, of both kinds.
func (p *process) said() []string { return append(p.stdout.all(), p.stderr.all()...) }

// wantLogged waits for a log line with these words and gives what follows them,
// up to the next blank or quote.
func (p *process) wantLogged(words string) string {
	p.t.Helper()
	line := p.stdout.either(p.t, p.stderr, words)
	_, rest, _ := strings.Cut(line, words)
	rest, _, _ = strings.Cut(rest, `"`)
	rest, _, _ = strings.Cut(rest, " ")
	return rest
}

// lines are what a process has said.
type lines struct {
	mu      sync.Mutex
	list    []string
	changed chan struct{} // closed and replaced
}

func newLines() *lines { return &lines{changed: make(chan struct{})} }

func (l *lines) read(r io.Reader) {
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		l.mu.Lock()
		l.list = append(l.list, scanner.Text())
		close(l.changed)
		l.changed = make(chan struct{})
		l.mu.Unlock()
	}
}

func (l *lines) all() []string {
	list, _ := l.now()
	return list
}

func (l *lines) now() ([]string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.list...), l.changed
}

// either waits for a line with these words in one of two.
func (l *lines) either(t testing.TB, other *lines, words string) string {
	t.Helper()
	deadline := time.After(patience)
	for {
		a, changedA := l.now()
		b, changedB := other.now()
		for _, line := range append(a, b...) {
			if strings.Contains(line, words) {
				return line
			}
		}
		select {
		case <-changedA:
		case <-changedB:
		case <-deadline:
			require.FailNow(t, "no such line", "wanted: %s", words)
		}
	}
}

// want waits until a number of lines fulfil a condition, and gives them.
func (l *lines) want(t testing.TB, n int, is func(line string) bool) []string {
	t.Helper()
	deadline := time.After(patience)
	for {
		all, changed := l.now()
		var found []string
		for _, line := range all {
			if is(line) {
				found = append(found, line)
			}
		}
		if len(found) >= n {
			return found
		}
		select {
		case <-changed:
		case <-deadline:
			require.FailNow(t, "lines are missing", "got %d of %d", len(found), n)
		}
	}
}
