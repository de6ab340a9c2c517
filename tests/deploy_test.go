package tests

import (
	"debug/elf"
	"encoding/json"
	"go/version"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The files of containers and clusters, read by the tools that they are for. What needs a
// container to run is not tested.

// readBy returns what a tool understood of a file; see tools/validate.
func readBy[T any](t *testing.T, tool, file string, env ...string) (content T) {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", file))
	require.NoError(t, err)
	cmd := exec.Command("go", "run", "-C", "../tools/validate", ".", tool, path) // builds it, unless it is cached
	cmd.Env = append(os.Environ(), env...)
	require.NoError(t, json.Unmarshal([]byte(testkit.Output(t, cmd)), &content))
	return content
}

// image is what BuildKit understands of the Dockerfile.
type image struct {
	Stages, Run                  []string
	User                         string
	Env                          map[string]string
	Expose                       []string
	Entrypoint, Cmd, Healthcheck []string
}

// readDockerfile reads the repository's Dockerfile.
func readDockerfile(t *testing.T) image {
	t.Helper()
	return readBy[image](t, "dockerfile", "Dockerfile")
}

// uid returns the user of the image, a number: Kubernetes cannot verify that a name is not
// root.
func (i image) uid(t *testing.T) int {
	t.Helper()
	user, _, _ := strings.Cut(i.User, ":")
	uid, err := strconv.Atoi(user)
	require.NoError(t, err)
	return uid
}

func TestImageRunsTheBinaryUnprivileged(t *testing.T) {
	image := readDockerfile(t)
	goVersion := testkit.Output(t, exec.Command("go", "list", "-m", "-f", "go{{.GoVersion}}"))
	require.Equal(t, "golang:"+strings.TrimPrefix(version.Lang(strings.TrimSpace(goVersion)), "go")+"-bookworm", image.Stages[0])

	require.NotZero(t, image.uid(t))
	require.Equal(t, []string{"/cryo-connect"}, image.Entrypoint)
	require.Equal(t, []string{"CMD", "/cryo-connect", "probe"}, image.Healthcheck)
	require.Equal(t, []string{"4195", "8080"}, image.Expose)

	// Scrapers and probes reach its HTTP server, and so does its own health check.
	require.Equal(t, map[string]string{"CRYO_CONNECT_HTTP_ADDRESS": "0.0.0.0:4195"}, image.Env)
	for key, value := range image.Env {
		t.Setenv(key, value)
	}
	require.Contains(t, testkit.Output(t, testkit.Command(t, "echo")), "address: 0.0.0.0:4195\n")
	require.Contains(t, testkit.Output(t, testkit.Command(t, "probe", "--help")), "127.0.0.1:4195/ping")

	needed := []string{"go.mod", "go.sum", "LICENSE", "cmd", "cryo", "internal", "plugin"}
	for line := range strings.Lines(testkit.ReadFile(t, "../.dockerignore")) {
		require.NotContains(t, needed, strings.TrimSpace(line), "the build needs it")
	}
}

// By default, the image's build command is only checked: for its linker variables, and for
// dependencies without cgo. With CRYO_LONG_TESTS=1 it is run, which compiles everything
// and takes minutes.
func TestImageBuildLinksAStaticBinary(t *testing.T) {
	const prefix = "CGO_ENABLED=0 go build "
	commands := slices.DeleteFunc(readDockerfile(t).Run, func(command string) bool { return !strings.HasPrefix(command, prefix) })
	require.Len(t, commands, 1)
	command := commands[0]
	wantLinkerVariables(t, command)
	list := exec.Command("go", "list", "-deps", "-f", "{{.CgoFiles}}", "../cmd/cryo-connect")
	list.Env = append(os.Environ(), "CGO_ENABLED=0")
	require.Empty(t, strings.Trim(testkit.Output(t, list), "[]\n"), "files with cgo")

	if !testkit.LongTests() {
		return
	}
	built := filepath.Join(t.TempDir(), "cryo-connect")
	build := exec.Command("sh", "-c", strings.ReplaceAll(command, "/out/cryo-connect", built))
	build.Dir = ".."
	build.Env = append(os.Environ(), "VERSION=v1.2.3", "COMMIT=abcdef0", "DATE=2026-01-02")
	testkit.Output(t, build)
	file, err := elf.Open(built)
	require.NoError(t, err)
	defer file.Close()
	for _, p := range file.Progs {
		require.NotEqual(t, elf.PT_INTERP, p.Type, "static")
	}
	stamp := testkit.Output(t, exec.Command(built, "--version"))
	require.Contains(t, stamp, "v1.2.3 (commit abcdef0)")
	require.Contains(t, stamp, "2026-01-02")
}

// shutdown returns the maximum duration of a pipeline's shutdown: its delay, its timeout
// and the second that the engine adds.
func shutdown(t *testing.T, config string) time.Duration {
	t.Helper()
	times := struct {
		Delay   time.Duration `yaml:"shutdown_delay"`
		Timeout time.Duration `yaml:"shutdown_timeout"`
	}{}
	require.NoError(t, yaml.Unmarshal([]byte(testkit.Output(t, testkit.Command(t, "create"))), &times))
	require.NotZero(t, times.Timeout)
	require.NoError(t, yaml.Unmarshal([]byte(config), &times))
	return times.Delay + times.Timeout + time.Second
}

func TestComposeFileIsConsistent(t *testing.T) {
	type service struct {
		Image       string
		Build       *struct{ Context string }
		Command     []string
		Environment map[string]string
		Volumes     []struct{ Type, Source, Target string }
		Ports       []struct {
			HostIP    string `json:"host_ip"`
			Target    int
			Published string
		}
		Expose      []string
		DependsOn   map[string]struct{ Condition string } `json:"depends_on"`
		StopGrace   string                                `json:"stop_grace_period"`
		PullPolicy  string                                `json:"pull_policy"`
		Healthcheck struct{ Test []string }
	}
	compose := readBy[struct{ Services map[string]service }](t, "compose", "deploy/compose.yaml", "CRYO_TOKEN="+token)
	// The addresses of the services that ours connect to.
	listens := map[string]string{"redpanda": "internal://0.0.0.0:9092", "minio": "--address=:9000"}
	for name, flag := range listens {
		require.Contains(t, strings.Join(compose.Services[name].Command, " "), flag)
	}
	require.Equal(t, []string{"8080"}, compose.Services["server"].Expose)
	addresses := []string{"redpanda:9092", "minio:9000", "server:8080"}

	ours := 0
	published := make(map[string]string)
	for name, s := range compose.Services {
		t.Run(name, func(t *testing.T) {
			for other, dependency := range s.DependsOn {
				if dependency.Condition == "service_healthy" {
					require.NotEmpty(t, compose.Services[other].Healthcheck.Test, "%s has no health check", other)
				}
			}
			for _, port := range s.Ports {
				require.Equal(t, "127.0.0.1", port.HostIP, "reachable from this machine only")
				require.Empty(t, published[port.Published], "port %s", port.Published)
				published[port.Published] = name
			}
			if s.Image != "cryo-connect:local" {
				require.Regexp(t, `:[^:]*\d|^cryo-server:local$`, s.Image, "an exact version")
				return
			}
			ours++
			require.FileExists(t, filepath.Join(s.Build.Context, "Dockerfile"))
			require.Equal(t, []string{"CMD", "/cryo-connect", "probe", "http://127.0.0.1:4195/ready"}, s.Healthcheck.Test)

			// It runs the one file that it mounts.
			require.Len(t, s.Volumes, 1)
			file := s.Volumes[0].Source
			last := len(s.Command) - 1
			require.Equal(t, []string{"run", s.Volumes[0].Target}, []string{s.Command[0], s.Command[last]})
			config := testkit.ReadFile(t, file)
			times := config
			for i := 1; i < last; i += 2 {
				require.Equal(t, "--set", s.Command[i])
				if delay, ok := strings.CutPrefix(s.Command[i+1], "shutdown_delay="); ok {
					times += "\nshutdown_delay: " + delay + "\n"
				}
			}
			grace, err := time.ParseDuration(s.StopGrace)
			require.NoError(t, err)
			require.Greater(t, grace, shutdown(t, times))

			for key, value := range s.Environment {
				if !strings.HasPrefix(key, "AWS_") {
					require.Contains(t, config, "${"+key, "the pipeline does not use the variable")
				}
				switch key {
				case "CRYO_ADDRESS":
					_, port, err := net.SplitHostPort(value)
					require.NoError(t, err)
					require.Len(t, s.Ports, 1)
					require.Equal(t, port, strconv.Itoa(s.Ports[0].Target))
				case "KAFKA_BROKERS":
					require.Contains(t, addresses, value)
				case "S3_ENDPOINT", "CRYO_URL":
					u, err := url.Parse(value)
					require.NoError(t, err)
					require.Contains(t, addresses, u.Host)
				case "S3_BUCKET":
					require.Contains(t, strings.Join(compose.Services["bucket"].Command, " "), "store/"+value)
				case "CRYO_TOKEN":
					require.Equal(t, token, value, "the value of the variable of that name")
				}
				t.Setenv(key, value)
			}
			wantLinted(t, nil, file)
		})
	}
	require.Equal(t, 3, ours)
	require.Equal(t, "never", compose.Services["server"].PullPolicy, "an image that the user built is not pulled")
}

func TestComposeFileRequiresAToken(t *testing.T) {
	validate := exec.Command("go", "run", "-C", "../tools/validate", ".", "compose", filepath.Join(testkit.Root(t), "deploy/compose.yaml"))
	validate.Env = append(os.Environ(), "CRYO_TOKEN=")
	out, err := validate.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "CRYO_TOKEN")
}

// manifest has the fields of the Kubernetes objects that the test looks at.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct {
		Selector json.RawMessage
		Ports    []struct{ TargetPort string }
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     struct {
				TerminationGracePeriodSeconds int
				SecurityContext               struct {
					RunAsNonRoot bool
					RunAsUser    int
				}
				Containers []struct {
					Args  []string
					Env   []struct{ Name string }
					Ports []struct {
						Name          string
						ContainerPort int
					}
					StartupProbe, LivenessProbe, ReadinessProbe struct {
						HTTPGet struct{ Path, Port string }
					}
					VolumeMounts []struct{ Name, MountPath string }
				}
				Volumes []struct {
					Name      string
					ConfigMap struct{ Name string }
				}
			}
		}
	}
}

func TestKubernetesManifestIsConsistent(t *testing.T) {
	byKind := make(map[string]manifest)
	for _, m := range readBy[[]manifest](t, "kubernetes", "deploy/kubernetes.yaml") {
		byKind[m.Kind] = m
	}
	pod := byKind["Deployment"].Spec.Template.Spec
	require.Len(t, pod.Containers, 1)
	container := pod.Containers[0]

	// The container runs the mounted configuration, which listens on the service's port.
	require.Equal(t, byKind["ConfigMap"].Metadata.Name, pod.Volumes[0].ConfigMap.Name)
	require.Equal(t, pod.Volumes[0].Name, container.VolumeMounts[0].Name)
	require.Equal(t, []string{"run", path.Join(container.VolumeMounts[0].MountPath, "config.yaml")}, container.Args)
	config := byKind["ConfigMap"].Data["config.yaml"]
	ports := make(map[string]int)
	for _, p := range container.Ports {
		ports[p.Name] = p.ContainerPort
	}
	require.Equal(t, map[string]int{"cryo": 8080, "http": 4195}, ports)
	require.Equal(t, "0.0.0.0:4195", readDockerfile(t).Env["CRYO_CONNECT_HTTP_ADDRESS"], "probes reach the port")
	require.NotContains(t, config, "http:", "the address is the image's")
	require.Contains(t, config, "address: ${CRYO_ADDRESS:0.0.0.0:"+strconv.Itoa(ports["cryo"])+"}")
	require.Equal(t, "cryo", byKind["Service"].Spec.Ports[0].TargetPort)
	for _, env := range container.Env {
		require.Contains(t, config, "${"+env.Name+"}")
	}
	var pods struct{ MatchLabels map[string]string }
	require.NoError(t, json.Unmarshal(byKind["Deployment"].Spec.Selector, &pods))
	require.Equal(t, byKind["Deployment"].Spec.Template.Metadata.Labels, pods.MatchLabels)
	labels := make(map[string]string)
	require.NoError(t, json.Unmarshal(byKind["Service"].Spec.Selector, &labels))
	require.Equal(t, pods.MatchLabels, labels)

	// It has time for its shutdown, and runs as the image's user.
	require.Greater(t, time.Duration(pod.TerminationGracePeriodSeconds)*time.Second, shutdown(t, config))
	require.True(t, pod.SecurityContext.RunAsNonRoot)
	require.Equal(t, readDockerfile(t).uid(t), pod.SecurityContext.RunAsUser)

	// It runs, and the probes succeed.
	k, api := runKafka(t, "events"), testkit.ReserveAddress(t)
	file := testkit.WriteFile(t, "config.yaml", config)
	for key, value := range map[string]string{"CRYO_ADDRESS": "127.0.0.1:0", "CRYO_TOKEN": token, "KAFKA_BROKERS": k.brokers()} {
		t.Setenv(key, value)
	}
	wantLinted(t, nil, file)
	p := launch(t, nil, "run", "--set", "http.address="+api, "--set", "shutdown_delay=0s", "--set", "input.cryo_server.drain_period=0s", file)
	address := p.Listening()
	var paths []string
	for _, probe := range []struct{ HTTPGet struct{ Path, Port string } }{container.StartupProbe, container.LivenessProbe, container.ReadinessProbe} {
		require.Equal(t, "http", probe.HTTPGet.Port)
		paths = append(paths, probe.HTTPGet.Path)
		testkit.Eventually(t, func(c *assert.CollectT) {
			out, err := testkit.Command(t, "probe", "http://"+api+probe.HTTPGet.Path).CombinedOutput()
			require.NoError(c, err, string(out))
		})
	}
	require.Equal(t, []string{"/ping", "/ping", "/ready"}, paths)
	testkit.WantDelivered(t, testkit.Dial(t, address), "hello")
	require.Equal(t, map[string]int{"hello": 1}, k.texts(t, "events"))
	p.Interrupt()
}

func TestWorkflowsPassLint(t *testing.T) {
	workflows, err := filepath.Glob("../.github/workflows/*.yml")
	require.NoError(t, err)
	require.NotEmpty(t, workflows)
	for i, file := range workflows {
		workflows[i], err = filepath.Abs(file)
		require.NoError(t, err)
	}
	testkit.Output(t, exec.Command("go", slices.Concat([]string{"tool", "-C", "../tools/validate", "actionlint"}, workflows)...))
}
