package testkit

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// Main runs the tests of a package that starts cryo-connect: call it in TestMain, and
// exit with what it returns. Afterwards it removes the binary, and fails if goroutines
// are left.
func Main(m *testing.M, leaks ...goleak.Option) (exitCode int) {
	exitCode = m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	if err := goleak.Find(leaks...); err != nil && exitCode == 0 {
		_, _ = io.WriteString(os.Stderr, err.Error()+"\n")
		return 1
	}
	return exitCode
}

// Root returns the repository's directory.
func Root(tb testing.TB) string {
	tb.Helper()
	dir, err := os.Getwd()
	require.NoError(tb, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.sum")); err == nil {
			return dir
		}
		require.NotEqual(tb, dir, filepath.Dir(dir), "no go.sum above the working directory")
		dir = filepath.Dir(dir)
	}
}

var built struct {
	once sync.Once
	dir  string
	path string
	out  []byte
	err  error
}

// Binary returns the path of cryo-connect, which is built once for a package's tests,
// with these flags of "go build". CRYO_CONNECT_BINARY names another one to test.
func Binary(tb testing.TB, flags ...string) string {
	tb.Helper()
	built.once.Do(func() {
		if built.path = os.Getenv("CRYO_CONNECT_BINARY"); built.path != "" {
			built.path, built.err = filepath.Abs(built.path)
			return
		}
		if built.dir, built.err = os.MkdirTemp("", "cryo-connect-"); built.err != nil { //nolint:usetesting // it outlives the test
			return
		}
		built.path = filepath.Join(built.dir, "cryo-connect")
		build := exec.Command("go", slices.Concat([]string{"build", "-o", built.path}, flags, []string{"./cmd/cryo-connect"})...)
		build.Dir = Root(tb)
		built.out, built.err = build.CombinedOutput()
	})
	require.NoError(tb, built.err, "building cryo-connect: %s", built.out)
	return built.path
}

// RaceDetector reports whether the tests run with the race detector.
func RaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// Command is cryo-connect with these arguments, in the repository's directory. Its
// environment is the test's; append to it.
func Command(tb testing.TB, args ...string) *exec.Cmd {
	tb.Helper()
	cmd := exec.Command(Binary(tb), args...)
	cmd.Dir, cmd.Env = Root(tb), os.Environ()
	return cmd
}

// Output runs a command to its end, which must be success, and returns its standard
// output. The failure shows its standard error.
func Output(tb testing.TB, cmd *exec.Cmd) string {
	tb.Helper()
	var problems strings.Builder
	cmd.Stderr = &problems
	out, err := cmd.Output()
	require.NoError(tb, err, "%s: %s%s", cmd, out, problems.String())
	return string(out)
}

// Process is a running program, with the lines that it writes to its standard output and
// standard error.
type Process struct {
	*Lines
	Cmd *exec.Cmd
}

// Start starts a command. The test's end kills it, if it still runs, and shows what it
// wrote if the test has failed.
func Start(tb testing.TB, cmd *exec.Cmd) *Process {
	tb.Helper()
	p := &Process{NewLines(tb, filepath.Base(cmd.Path)), cmd}
	p.ended = make(chan struct{})
	stdout, err := cmd.StdoutPipe()
	require.NoError(tb, err)
	stderr, err := cmd.StderrPipe()
	require.NoError(tb, err)
	require.NoError(tb, cmd.Start())
	var reading sync.WaitGroup
	for _, pipe := range []io.Reader{stdout, stderr} {
		reading.Go(func() {
			for lines := bufio.NewReader(pipe); ; {
				line, err := lines.ReadString('\n')
				if line != "" {
					_, _ = p.Lines.Write([]byte(line))
				}
				if err != nil {
					return
				}
			}
		})
	}
	go func() {
		reading.Wait()
		_ = cmd.Wait() // WantExit looks at the exit code
		close(p.ended)
	}()
	tb.Cleanup(func() {
		p.Kill()
		if tb.Failed() {
			lines := p.All()
			tb.Logf("the last lines of %s:\n%s", cmd, strings.Join(lines[max(0, len(lines)-200):], "\n"))
		}
	})
	return p
}

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Kill ends the process without a chance to clean up, and waits for its end.
func (p *Process) Kill() {
	_ = p.Cmd.Process.Kill()
	<-p.ended
}

// Signal sends a signal.
func (p *Process) Signal(signal syscall.Signal) {
	p.tb.Helper()
	require.NoError(p.tb, p.Cmd.Process.Signal(signal))
}

// Interrupt sends SIGINT, as Ctrl-C does, and waits for the end, with exit code 0.
func (p *Process) Interrupt() {
	p.tb.Helper()
	p.AwaitLaunch()
	p.Signal(syscall.SIGINT)
	p.WantExit(0)
}

// Terminate sends SIGTERM, as a service manager does, and waits for the end, with exit
// code 0.
func (p *Process) Terminate() {
	p.tb.Helper()
	p.AwaitLaunch()
	p.Signal(syscall.SIGTERM)
	p.WantExit(0)
}

// AwaitStopHandling waits until cryo-connect does on a signal what the engine does not: it begins to
// a tenth of a second after the engine handles signals (cmd/cryo-connect/stop.go).
func (p *Process) AwaitStopHandling() {
	p.tb.Helper()
	p.AwaitLaunch()
	time.Sleep(150 * time.Millisecond)
	p.awaitIdle()
}

// AwaitLaunch waits until cryo-connect handles signals, which kill it before that. It does so a
// moment after the line that all pipelines are launched; without that line, as at log level ERROR,
// after a second.
func (p *Process) AwaitLaunch() {
	launched := func(line string) bool {
		return strings.Contains(line, "Launching a cryo-connect") || strings.Contains(line, "Launching cryo-connect")
	}
	for range 100 {
		if slices.ContainsFunc(p.All(), launched) || !p.Running() {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.awaitIdle()
}

// awaitIdle waits until no thread of the process runs or waits for a processor, for 30 ms at least
// and, because a pipeline may be busy, about 200 ms at most. A process on a busy machine can need
// long for the few instructions behind a line that it logs. Only Linux shows the threads.
func (p *Process) awaitIdle() {
	for idle, tries := 0, 0; idle < 3 && tries < 20; tries++ {
		time.Sleep(10 * time.Millisecond)
		idle++
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Cmd.Process.Pid))
		for _, thread := range threads {
			stat, _ := os.ReadFile(thread)
			if _, state, _ := strings.Cut(string(stat), ") "); strings.HasPrefix(state, "R") || strings.HasPrefix(state, "D") {
				idle = 0
			}
		}
	}
}

// WantExit waits for the end of the process, with an exit code.
func (p *Process) WantExit(code int) {
	p.tb.Helper()
	require.Equal(p.tb, code, p.ExitCode(), "the exit code of %s", p.Cmd)
}

// ExitCode waits for the end of the process, and returns its exit code.
func (p *Process) ExitCode() int {
	p.tb.Helper()
	select {
	case <-p.ended:
	case <-time.After(Patience):
		require.FailNow(p.tb, "timed out", "%s is still running", p.Cmd)
	}
	return p.Cmd.ProcessState.ExitCode()
}
