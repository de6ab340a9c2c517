package tests

import (
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// tutorial runs the blocks of docs/tutorial.md in the order of the page, in a directory that looks
// like a clone of the repository, with its own addresses.
type tutorial struct {
	t         *testing.T
	dir       string
	addresses *strings.Replacer
	env       []string
	blocks    []tutorialBlock // those that are left
}

// tutorialBlock is a fenced block with the paragraph before it.
type tutorialBlock struct{ before, language, content string }

func openTutorial(t *testing.T, k *kafka) *tutorial {
	t.Helper()
	tour := &tutorial{t: t, dir: t.TempDir()}
	for name, target := range map[string]string{"config": filepath.Join(testkit.Root(t), "config"), "cryo-connect": testkit.Binary(t)} {
		require.NoError(t, os.Symlink(target, filepath.Join(tour.dir, name)))
	}
	page := testkit.ReserveAddress(t)
	tour.addresses = strings.NewReplacer(
		"localhost:9092", k.brokers(),
		"127.0.0.1:8080", testkit.ReserveAddress(t),
		"127.0.0.1:8081", page,
		"127.0.0.1:8082", testkit.ReserveAddress(t),
	)
	tour.env = []string{"PAGE_ADDRESS=" + page, "CRYO_CONNECT_HTTP_ADDRESS=" + testkit.ReserveAddress(t)}
	for _, block := range regexp.MustCompile("(?ms)([^\n]*)\n*^```(\\w+)\n(.*?)^```$").FindAllStringSubmatch(testkit.ReadFile(t, "../docs/tutorial.md"), -1) {
		tour.blocks = append(tour.blocks, tutorialBlock{block[1], block[2], block[3]})
	}
	return tour
}

// next returns the next block of the page, which must have this language.
func (tour *tutorial) next(language string) tutorialBlock {
	tour.t.Helper()
	require.NotEmpty(tour.t, tour.blocks)
	block := tour.blocks[0]
	tour.blocks = tour.blocks[1:]
	require.Equal(tour.t, language, block.language, block.content)
	return block
}

// file writes the next block to the file that the paragraph before it names first.
func (tour *tutorial) file(name string) {
	tour.t.Helper()
	block := tour.next("yaml")
	require.Contains(tour.t, block.before, "`"+name+"`")
	require.NoError(tour.t, os.WriteFile(filepath.Join(tour.dir, name), []byte(tour.addresses.Replace(block.content)), 0o600))
}

// skip passes over the next block, of commands that the test does in another way.
func (tour *tutorial) skip(commands ...string) {
	tour.t.Helper()
	require.Equal(tour.t, strings.Join(commands, "\n")+"\n", tour.next("sh").content)
}

// start runs the next block, whose last command must be this one, until the test's end.
func (tour *tutorial) start(command string) *testkit.Process {
	tour.t.Helper()
	lines := strings.TrimSpace(tour.next("sh").content)
	require.True(tour.t, strings.HasSuffix(lines, command), "%s: %s", command, lines)
	before := strings.TrimSuffix(lines, command)
	cmd := exec.Command("sh", "-c", before+"exec env "+command) // exec, so that signals reach it
	cmd.Dir, cmd.Env = tour.dir, append(os.Environ(), tour.env...)
	return testkit.Start(tour.t, cmd)
}

// want wants the lines of the next block in the output of a process, in this order. The numbers may
// be others.
func (tour *tutorial) want(p *testkit.Process) {
	tour.t.Helper()
	for line := range strings.SplitSeq(strings.TrimSpace(tour.next("text").content), "\n") {
		pattern := regexp.MustCompile(regexp.MustCompile(`\d+(\\\.\d+)?`).ReplaceAllString(regexp.QuoteMeta(line), `[\d.]+`))
		p.Take(line, pattern.MatchString)
	}
}

// browse opens the URL of the next block, and wants readings on the page.
func (tour *tutorial) browse(name string) {
	tour.t.Helper()
	address := tour.addresses.Replace(strings.TrimSpace(tour.next("text").content))
	page, err := url.Parse(address)
	require.NoError(tour.t, err)
	testkit.Eventually(tour.t, func(c *assert.CollectT) { // a person opens the page after the server has started
		conn, err := net.Dial("tcp", page.Host)
		require.NoError(c, err)
		require.NoError(c, conn.Close())
	})
	tour.t.Run(name, func(t *testing.T) {
		browser := openBrowser(t, address)
		browser.wantState("connected")
		browser.want(`[...document.querySelectorAll("#log li.received")].filter(li => /"celsius":/.test(li.textContent)).length > 1`)
	})
}

func TestTutorialRunsAsWritten(t *testing.T) {
	k := runKafka(t, "readings")
	tour := openTutorial(t, k)

	tour.skip("go build ./cmd/cryo-connect", "docker run --detach --name kafka --publish 9092:9092 apache/kafka:3.9.1")
	tour.file("server.yaml")
	server := tour.start("./cryo-connect run server.yaml")
	tour.want(server)

	tour.file("device.yaml")
	device := tour.start("./cryo-connect run device.yaml")
	tour.want(device)

	tour.file("print.yaml")
	printer := tour.start("./cryo-connect run print.yaml")
	tour.want(printer)

	tour.skip("docker stop kafka")
	k.SetDown(true)
	tour.want(server)
	device.Drop(acknowledged)
	require.Never(t, func() bool { return acknowledgedBy(device) > k.stored("readings") }, 2*time.Second, 50*time.Millisecond)

	tour.skip("docker start kafka")
	k.SetDown(false)
	tour.want(device)
	printer.Interrupt()

	tour.file("browser.yaml")
	server.Interrupt()
	server = tour.start("./cryo-connect streams server.yaml browser.yaml config/browser/page.yaml")
	tour.browse("the page shows readings")

	tour.file("server.yaml")
	tour.file("browser.yaml")
	server.Interrupt()
	server = tour.start("./cryo-connect streams server.yaml browser.yaml config/browser/page.yaml")
	tour.want(server)
	device.Kill() // Ctrl-C would wait for acknowledgements
	device = tour.start("CRYO_TOKEN=4c31d2a8 ./cryo-connect run device.yaml")
	tour.want(device)
	tour.browse("the page shows readings with a token")
	device.Interrupt()
	server.Interrupt()
	found := k.texts(t, "readings")
	for _, line := range device.All() {
		if acknowledged(line) {
			require.NotZero(t, found[strings.TrimPrefix(line, "acknowledged: ")], line)
		}
	}
	tour.skip("docker rm --force kafka")
	require.Empty(t, tour.blocks)
}

// acknowledgedBy returns the number of readings that a device has printed as acknowledged.
func acknowledgedBy(device *testkit.Process) int {
	n := 0
	for _, line := range device.All() {
		if acknowledged(line) {
			n++
		}
	}
	return n
}

func acknowledged(line string) bool { return strings.HasPrefix(line, "acknowledged: ") }
