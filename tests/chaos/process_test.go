//go:build linux

package chaos

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// process is cryo-connect with one pipeline, as one process after the other.
type process struct {
	t        *testing.T
	name     string
	path     string    // file with the configuration
	command  *exec.Cmd // started repeatedly, by copies
	pipeline string
	http     string // address of the engine's HTTP server
	secrets  func() []string
	faulty   sync.Mutex // held by a fault: each process has one at a time
	writes   int        // number of writes of the configuration; guarded by faulty
	lines    atomic.Int64
	leaked   atomic.Bool // a line contained a token
	restarts atomic.Int64

	mu       sync.Mutex
	cmd      *exec.Cmd
	stopping bool          // the next end is not a failure
	launched chan struct{} // closed when the pipeline runs
	ended    chan struct{} // closed when the process has ended and its output is read
	began    time.Time     // when the first one was started
}

// newProcess starts a process, and another one whenever one has ended, until the test's end.
func newProcess(t *testing.T, dir, name, pipeline string, secrets func() []string) *process {
	t.Helper()
	p := &process{
		t: t, name: name, pipeline: pipeline, path: filepath.Join(dir, name+".yaml"), http: testkit.ReserveAddress(t),
		secrets: secrets, began: time.Now(),
	}
	p.command = testkit.Command(t, "run", "-w", p.path)
	require.NoError(t, p.configure(p.config()))
	require.NoError(t, p.start())
	t.Cleanup(func() {
		_, err := p.stop(syscall.SIGKILL)
		assert.NoError(t, err)
		if t.Failed() {
			t.Logf("the last lines of %s:\n%s", name, p.lastLines(60))
		}
	})
	return p
}

// config returns the configuration, which differs each time.
func (p *process) config() string {
	p.writes++
	return fmt.Sprintf(`# version %d
http: { address: %q }
metrics: { prometheus: { add_process_metrics: true, add_go_metrics: true } }
%s`, p.writes, p.http, p.pipeline)
}

// configure writes the configuration's file.
func (p *process) configure(content string) error { return replace(p.path, content) }

func (p *process) logPath() string { return filepath.Join(p.t.ArtifactDir(), p.name+".log") }

// start starts a process.
func (p *process) start() error {
	cmd := exec.Command(p.command.Path, p.command.Args[1:]...)
	cmd.Dir, cmd.Env = p.command.Dir, p.command.Env
	output, input, err := os.Pipe()
	if err != nil {
		return err
	}
	defer input.Close()
	log, err := os.OpenFile(p.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		_ = output.Close()
		return err
	}
	cmd.Stdout, cmd.Stderr = input, input
	if err := cmd.Start(); err != nil {
		_, _ = output.Close(), log.Close()
		return err
	}
	launched, ended := make(chan struct{}), make(chan struct{})
	p.mu.Lock()
	p.cmd, p.stopping, p.launched, p.ended = cmd, false, launched, ended
	p.mu.Unlock()
	go func() {
		p.read(output, log, launched)
		_, _ = output.Close(), log.Close()
		_ = cmd.Wait() // stop returns the exit code
		p.mu.Lock()
		assert.True(p.t, p.stopping, "%s has ended by itself: %v", p.name, cmd.ProcessState)
		p.mu.Unlock()
		close(ended)
	}()
	return nil
}

// read reads what a process logs, to its end.
func (p *process) read(output io.Reader, log io.Writer, launched chan struct{}) {
	running := false
	for lines := bufio.NewReader(output); ; {
		line, err := lines.ReadString('\n')
		if line != "" {
			p.lines.Add(1)
			_, _ = io.WriteString(log, line)
			for _, secret := range p.secrets() {
				if strings.Contains(line, secret) && !p.leaked.Swap(true) {
					assert.Fail(p.t, "a token is in the log", "%s: %s", p.name, strings.ReplaceAll(line, secret, "<token>"))
				}
			}
			assert.NotContains(p.t, line, "DATA RACE", "%s, built with -race", p.name)
			if !running && strings.Contains(line, "Launching a cryo-connect") {
				running = true
				close(launched)
			}
		}
		if err != nil {
			return
		}
	}
}

// current returns the process id, and when the process runs its pipeline or has ended.
func (p *process) current() (pid int, launched, ended <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid, p.launched, p.ended
}

// awaitLaunch waits until the pipeline runs and the process handles signals, which would
// end it before that.
func (p *process) awaitLaunch() error {
	_, launched, ended := p.current()
	select {
	case <-launched:
		time.Sleep(200 * time.Millisecond) // the engine handles signals a moment later
		return nil
	case <-ended:
		return fmt.Errorf("%s has ended", p.name)
	case <-time.After(testkit.Patience):
		return fmt.Errorf("%s has not launched its pipeline", p.name)
	}
}

// stop ends the process by a signal, and returns the exit code.
func (p *process) stop(signal syscall.Signal) (code int, err error) {
	p.mu.Lock()
	p.stopping = true
	cmd, ended := p.cmd, p.ended
	p.mu.Unlock()
	if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return 0, err
	}
	select {
	case <-ended:
		return cmd.ProcessState.ExitCode(), nil
	case <-time.After(testkit.Patience):
		_ = cmd.Process.Kill()
		<-ended
		return 0, fmt.Errorf("%s did not end after %v", p.name, signal)
	}
}

// signal sends a signal that does not end the process.
func (p *process) signal(signal syscall.Signal) error {
	pid, _, _ := p.current()
	return syscall.Kill(pid, signal)
}

// limit lowers a resource limit of the running process, and returns what restores it.
func (p *process) limit(resource int, value uint64) (restore func() error, err error) {
	pid, _, _ := p.current()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, resource, nil, &old); err != nil {
		return nil, err
	}
	lower := unix.Rlimit{Cur: value, Max: old.Max}
	return func() error { return unix.Prlimit(pid, resource, &old, nil) }, unix.Prlimit(pid, resource, &lower, nil)
}

// metrics returns the values that the process exports, by series.
func (p *process) metrics() (map[string]float64, error) {
	resp, err := testkit.HTTP(http.MethodGet, "http://"+p.http+"/metrics", "")
	if err != nil {
		return nil, err
	}
	series := make(map[string]float64)
	for line := range strings.Lines(resp.Body) {
		if at := strings.LastIndexByte(line, ' '); at > 0 && line[0] != '#' {
			series[line[:at]], err = strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
			if err != nil {
				return nil, err
			}
		}
	}
	return series, nil
}

// ready returns nil if the process reports that it is connected.
func (p *process) ready() error {
	resp, err := testkit.HTTP(http.MethodGet, "http://"+p.http+"/ready", "")
	if err == nil && resp.Status != http.StatusOK {
		err = fmt.Errorf("/ready of %s: %d %s", p.name, resp.Status, resp.Body)
	}
	return err
}

// lastLines returns the end of the log.
func (p *process) lastLines(n int) string {
	content, _ := os.ReadFile(p.logPath())
	lines := strings.SplitAfter(string(content), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}
