package tests

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const (
	acknowledgedMessage = "acknowledged: {"
	acknowledgedStream  = "acknowledged: readings.csv"
)

// quickstart runs config/quickstart.yaml as the README does, with its own port and file.
func quickstart(t *testing.T, env ...string) (p *testkit.Process, address, file string) {
	t.Helper()
	address, file = testkit.ReserveAddress(t), filepath.Join(t.TempDir(), "quickstart.jsonl")
	env = append([]string{"QUICKSTART_ADDRESS=" + address, "QUICKSTART_FILE=" + file}, env...)
	return launch(t, env, "run", "config/quickstart.yaml"), address, file
}

// endQuickstart ends the quickstart by Ctrl-C, and wants no warning or error in the log.
func endQuickstart(t *testing.T, p *testkit.Process) {
	t.Helper()
	p.Interrupt()
	for _, line := range p.All() {
		require.NotRegexp(t, "level=(warn|error)", line)
	}
	p.WantLog("Listener closed")
}

func TestQuickstartPrintsTheContentOfTheFile(t *testing.T) {
	p, address, file := quickstart(t)
	for range 2 {
		line := p.Take("an acknowledged message", func(line string) bool { return strings.HasPrefix(line, acknowledgedMessage) })
		require.Contains(t, testkit.ReadFile(t, file), strings.TrimPrefix(line, "acknowledged: "))
	}
	p.Take("an acknowledged stream", func(line string) bool { return line == acknowledgedStream })
	require.Contains(t, testkit.ReadFile(t, file), `{"celsius":"19.5","sensor":"sensor-4"}`+"\n"+`{"celsius":"21.0","sensor":"sensor-5"}`)
	if runtime.GOOS == "linux" {
		require.Equal(t, []string{address}, listening(t, p.Cmd.Process.Pid), "the only port is that of the Cryo server")
	}
	endQuickstart(t, p)
}

func TestQuickstartSendsToKafkaIfBrokersAreSet(t *testing.T) {
	k := runKafka(t, "quickstart")
	p, _, file := quickstart(t, "KAFKA_BROKERS="+k.brokers())
	line := p.Take("an acknowledged message", func(line string) bool { return strings.HasPrefix(line, acknowledgedMessage) })
	require.Equal(t, 1, k.texts(t, "quickstart")[strings.TrimPrefix(line, "acknowledged: ")])
	p.Take("an acknowledged stream", func(line string) bool { return line == acknowledgedStream })
	require.Equal(t, 1, k.texts(t, "quickstart")[`{"celsius":"21.0","sensor":"sensor-5"}`])
	require.NoFileExists(t, file)
	endQuickstart(t, p)
}

// The default port is on the loopback interface, below the ports that systems give to outgoing
// connections, and not that of another example.
func TestQuickstartUsesItsOwnPort(t *testing.T) {
	defaults := regexp.MustCompile(`\$\{QUICKSTART_ADDRESS:([^}]+)\}`).FindAllStringSubmatch(testkit.ReadFile(t, "../config/quickstart.yaml"), -1)
	require.Len(t, defaults, 2, "the server's address, and the client's")
	require.Equal(t, defaults[0], defaults[1])
	address := netip.MustParseAddrPort(defaults[0][1])
	require.True(t, address.Addr().IsLoopback())
	require.Greater(t, address.Port(), uint16(1023))
	require.Less(t, address.Port(), uint16(32768))
	others := 0
	for _, dir := range []string{"../config", "../deploy"} {
		require.NoError(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
			if err == nil && !entry.IsDir() && path != "../config/quickstart.yaml" {
				require.NotRegexp(t, fmt.Sprintf(`\b%d\b`, address.Port()), testkit.ReadFile(t, path), path)
				others++
			}
			return err
		}))
	}
	require.Positive(t, others)
}

// listening returns the TCP addresses on which a process listens, from /proc.
func listening(t *testing.T, pid int) []string {
	t.Helper()
	proc := "/proc/" + strconv.Itoa(pid)
	descriptors, err := os.ReadDir(proc + "/fd")
	require.NoError(t, err)
	var sockets []string
	for _, fd := range descriptors {
		if target, err := os.Readlink(proc + "/fd/" + fd.Name()); err == nil {
			sockets = append(sockets, target)
		}
	}
	const listen = "0A"
	var addresses []string
	for _, table := range []string{"/net/tcp", "/net/tcp6"} {
		for line := range strings.Lines(testkit.ReadFile(t, proc+table)) {
			fields := strings.Fields(line) // sl, local_address, rem_address, st, …, the inode in the tenth
			if len(fields) < 10 || fields[3] != listen || !slices.Contains(sockets, "socket:["+fields[9]+"]") {
				continue
			}
			host, port, _ := strings.Cut(fields[1], ":")
			ip, err := hex.DecodeString(host)
			require.NoError(t, err)
			for word := range slices.Chunk(ip, 4) {
				slices.Reverse(word)
			}
			number, err := strconv.ParseUint(port, 16, 16)
			require.NoError(t, err)
			addresses = append(addresses, net.JoinHostPort(net.IP(ip).String(), strconv.FormatUint(number, 10)))
		}
	}
	return addresses
}

// runREADME runs a pipeline of the README, by its number, with other addresses.
func runREADME(t *testing.T, number int, env []string, settings ...string) *testkit.Process {
	t.Helper()
	pipelines := blocks(testkit.ReadFile(t, "../README.md"), "yaml")
	require.Len(t, pipelines, 2)
	args := []string{"run", "--set", "http.enabled=false", "--set", "input.cryo_server.address=127.0.0.1:0"}
	for _, setting := range settings {
		args = append(args, "--set", setting)
	}
	return launch(t, append(env, "CRYO_TOKEN="+token), append(args, testkit.WriteFile(t, "pipeline.yaml", pipelines[number]))...)
}

func TestPipelineInREADMESendsMessagesToKafka(t *testing.T) {
	k := runKafka(t, "events")
	p := runREADME(t, 0, nil, "output.redpanda.seed_brokers.0="+k.brokers())
	testkit.WantDelivered(t, testkit.Dial(t, p.Listening()), "hello")
	require.Equal(t, map[string]int{"hello": 1}, k.texts(t, "events"))
	p.Interrupt()
}

func TestPipelineInREADMESendsStreamsToS3(t *testing.T) {
	store := runS3(t)
	p := runREADME(t, 1, store.env(), "output.aws_s3.bucket="+bucket, "output.aws_s3.region=us-east-1", "output.aws_s3.endpoint=http://"+store.address, "output.aws_s3.force_path_style_urls=true")
	s := testkit.Dial(t, p.Listening())
	require.NoError(t, testkit.Next(t, testkit.SendStream(s, "größe\n.txt", strings.NewReader("hello"))))
	objects := store.objects()
	require.Len(t, objects, 1)
	for key, content := range objects {
		require.Regexp(t, `^`+strconv.FormatUint(s.ID(), 10)+`/[0-9a-f-]{36}$`, key)
		require.Equal(t, "hello", content)
	}
	p.Interrupt()
}
