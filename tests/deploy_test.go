package tests

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"
)

// What containers and clusters need, as far as it can be seen without one.

// instructions are those of the Dockerfile, with lines that go on joined.
func instructions(t *testing.T) []string {
	t.Helper()
	content, err := os.ReadFile("../Dockerfile")
	require.NoError(t, err)
	text := regexp.MustCompile(`(?m)^\s*#.*\n`).ReplaceAllString(string(content), "")
	text = regexp.MustCompile(`\\\n\s*`).ReplaceAllString(text, "")
	return strings.Split(strings.TrimSpace(text), "\n")
}

// instruction gives what follows the last one that begins so.
func instruction(t *testing.T, begin string) string {
	t.Helper()
	found := ""
	for _, line := range instructions(t) {
		if rest, ok := strings.CutPrefix(line, begin+" "); ok {
			found = rest
		}
	}
	require.NotEmpty(t, found, begin)
	return strings.TrimSpace(found)
}

func TestTheImageHasWhatItNeeds(t *testing.T) {
	var directive string
	module, err := os.ReadFile("../go.mod")
	require.NoError(t, err)
	for line := range strings.Lines(string(module)) {
		if v, ok := strings.CutPrefix(line, "go "); ok {
			directive = strings.TrimSpace(v)
		}
	}
	parts := strings.Split(directive, ".")
	require.Contains(t, instructions(t), "FROM golang:"+parts[0]+"."+parts[1]+"-bookworm AS build")

	user, _, _ := strings.Cut(instruction(t, "USER"), ":")
	uid, err := strconv.Atoi(user)
	require.NoError(t, err, "a number, by which Kubernetes can tell that it isn't root")
	require.NotZero(t, uid)

	require.Equal(t, `[ "/cryo-connect" ]`, instruction(t, "ENTRYPOINT"))
	health := instruction(t, "HEALTHCHECK")
	require.Contains(t, health, `CMD [ "/cryo-connect", "probe" ]`)
	help, err := exec.Command(binary, "probe", "--help").CombinedOutput()
	require.NoError(t, err, string(help))
	require.Contains(t, string(help), "127.0.0.1:4195/ping")
	require.Equal(t, "4195 8080", instruction(t, "EXPOSE"))

	ignored, err := os.ReadFile("../.dockerignore")
	require.NoError(t, err)
	needed := []string{"go.mod", "go.sum", "LICENSE", "cmd", "cryo", "internal", "plugin"}
	for line := range strings.Lines(string(ignored)) {
		require.NotContains(t, needed, strings.TrimSpace(line), "the build needs it")
	}
}

// TestTheImagesBuildCommand runs that command of the Dockerfile only if
// CRYO_LONG_TESTS=1: it compiles everything anew, which takes minutes. By
// default it wants the command to name what there is, and everything to be there
// without a C compiler.
func TestTheImagesBuildCommand(t *testing.T) {
	command := ""
	for _, line := range instructions(t) {
		if _, build, ok := strings.Cut(line, "CGO_ENABLED=0 go build"); ok && strings.HasPrefix(line, "RUN ") {
			command = "CGO_ENABLED=0 go build" + build
		}
	}
	require.NotEmpty(t, command)
	wantLinkerVariables(t, command)
	list := exec.Command("go", "list", "-deps", "-f", "{{.CgoFiles}}", "../cmd/cryo-connect")
	list.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := list.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Empty(t, strings.Trim(string(out), "[]\n"), "no C")

	if os.Getenv("CRYO_LONG_TESTS") != "1" {
		return
	}
	built := filepath.Join(t.TempDir(), "cryo-connect")
	build := exec.Command("sh", "-c", strings.ReplaceAll(command, "/out/cryo-connect", built))
	build.Dir = ".."
	build.Env = append(os.Environ(), "VERSION=v1.2.3", "COMMIT=abcdef0", "DATE=2026-01-02")
	out, err = build.CombinedOutput()
	require.NoError(t, err, string(out))
	file, err := elf.Open(built)
	require.NoError(t, err)
	defer func() { _ = file.Close() }()
	for _, p := range file.Progs {
		require.NotEqual(t, elf.PT_INTERP, p.Type, "static")
	}
	said, err := exec.Command(built, "--version").CombinedOutput()
	require.NoError(t, err)
	require.Contains(t, string(said), "v1.2.3 (commit abcdef0)")
	require.Contains(t, string(said), "2026-01-02")
}

// decodeYAML decodes all documents of a file.
func decodeYAML[T any](t *testing.T, file string) []T {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	require.True(t, bytes.HasPrefix(content, []byte("# Shows: ")), "%s: the first line says what it shows", file)
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	var all []T
	for {
		var document T
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return all
		}
		require.NoError(t, err, file)
		all = append(all, document)
	}
}

// shutdown is how long a pipeline takes at most to end: its delay, its time-out
// and the second that the engine adds.
func shutdown(t *testing.T, config string) time.Duration {
	t.Helper()
	times := struct {
		Delay   time.Duration `yaml:"shutdown_delay"`
		Timeout time.Duration `yaml:"shutdown_timeout"`
	}{}
	defaults, err := exec.Command(binary, "create").Output()
	require.NoError(t, err)
	require.NoError(t, yaml.Unmarshal(defaults, &times))
	require.NotZero(t, times.Timeout)
	require.NoError(t, yaml.Unmarshal([]byte(config), &times))
	return times.Delay + times.Timeout + time.Second
}

func wantLinted(t *testing.T, file string, env ...string) {
	t.Helper()
	lint := exec.Command(binary, "lint", "--deprecated", file)
	lint.Env = append(os.Environ(), env...)
	out, err := lint.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Empty(t, string(out))
}

func TestTheComposeFileFitsTogether(t *testing.T) {
	type service struct {
		Image      string
		Build      struct{ Context string }
		Profiles   []string
		Command    []string
		Env        map[string]string `yaml:"environment"`
		Volumes    []string
		Ports      []string
		Expose     []string
		DependsOn  map[string]struct{ Condition string } `yaml:"depends_on"`
		Grace      time.Duration                         `yaml:"stop_grace_period"`
		PullPolicy string                                `yaml:"pull_policy"`
		Health     struct{ Test []string }               `yaml:"healthcheck"`
	}
	files := decodeYAML[struct {
		Services map[string]service
		Volumes  map[string]any
	}](t, "../deploy/compose.yaml")
	require.Len(t, files, 1)
	compose := files[0]
	// What the others listen on.
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
				require.Contains(t, compose.Services, other)
				if dependency.Condition == "service_healthy" {
					require.NotEmpty(t, compose.Services[other].Health.Test, "%s has no health check", other)
				}
			}
			for _, port := range s.Ports {
				require.Regexp(t, `^127\.0\.0\.1:\d+:\d+$`, port, "for this machine only")
				host := strings.Split(port, ":")[1]
				require.Empty(t, published[host], "port %s", host)
				published[host] = name
			}
			for _, v := range s.Volumes {
				if source, _, _ := strings.Cut(v, ":"); !strings.HasPrefix(source, ".") {
					require.Contains(t, compose.Volumes, source)
				}
			}
			if s.Image != "cryo-connect:local" {
				require.Regexp(t, `:[^:]*\d|^\$\{CRYO_SERVER_IMAGE`, s.Image, "an exact version")
				return
			}
			ours++
			require.FileExists(t, filepath.Join("../deploy", s.Build.Context, "Dockerfile"))
			require.Equal(t, []string{"CMD", "/cryo-connect", "probe", "http://127.0.0.1:4195/ready"}, s.Health.Test)

			// The one file it mounts is the one it runs.
			require.Len(t, s.Volumes, 1)
			mount := strings.Split(s.Volumes[0], ":")
			require.Equal(t, []string{"run", mount[1]}, s.Command)
			file := filepath.Join("../deploy", mount[0])
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Greater(t, s.Grace, shutdown(t, string(content)))

			var env []string
			for key, value := range s.Env {
				if !strings.HasPrefix(key, "AWS_") {
					require.Contains(t, string(content), "${"+key+":", "the pipeline has no use for it")
				}
				switch key {
				case "CRYO_ADDRESS":
					_, port, err := net.SplitHostPort(value)
					require.NoError(t, err)
					require.Len(t, s.Ports, 1)
					require.Equal(t, port, strings.Split(s.Ports[0], ":")[2])
				case "KAFKA_BROKERS":
					require.Contains(t, addresses, value)
				case "S3_ENDPOINT", "CRYO_URL":
					u, err := url.Parse(value)
					require.NoError(t, err)
					require.Contains(t, addresses, u.Host)
				case "S3_BUCKET":
					require.Contains(t, strings.Join(compose.Services["bucket"].Command, " "), "store/"+value)
				case "CRYO_TOKEN":
					require.True(t, strings.HasPrefix(value, "${CRYO_TOKEN:?"), "chosen by who runs it")
					value = token
				}
				env = append(env, key+"="+value)
			}
			wantLinted(t, file, env...)
		})
	}
	require.Equal(t, 3, ours)
	require.Equal(t, "never", compose.Services["server"].PullPolicy, "what a user built isn't looked for elsewhere")
}

// manifest has the fields of the Kubernetes objects that are looked at.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct {
		Selector yaml.Node
		Ports    []struct {
			Port       int
			TargetPort string `yaml:"targetPort"`
		}
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     struct {
				Grace           int `yaml:"terminationGracePeriodSeconds"`
				SecurityContext struct {
					RunAsNonRoot bool `yaml:"runAsNonRoot"`
					RunAsUser    int  `yaml:"runAsUser"`
				} `yaml:"securityContext"`
				Containers []struct {
					Args []string
					Env  []struct{ Name string }
					Port []struct {
						Name          string
						ContainerPort int `yaml:"containerPort"`
					} `yaml:"ports"`
					Liveness  probe `yaml:"livenessProbe"`
					Readiness probe `yaml:"readinessProbe"`
					Startup   probe `yaml:"startupProbe"`
					Mounts    []struct {
						Name      string
						MountPath string `yaml:"mountPath"`
					} `yaml:"volumeMounts"`
				}
				Volumes []struct {
					Name      string
					ConfigMap struct{ Name string } `yaml:"configMap"`
				}
			}
		}
	}
}

type probe struct {
	HTTPGet struct{ Path, Port string } `yaml:"httpGet"`
}

func TestTheKubernetesManifestFitsTogether(t *testing.T) {
	byKind := make(map[string]manifest)
	for _, m := range decodeYAML[manifest](t, "../deploy/kubernetes.yaml") {
		byKind[m.Kind] = m
	}
	pod := byKind["Deployment"].Spec.Template.Spec
	require.Len(t, pod.Containers, 1)
	container := pod.Containers[0]

	// The configuration is where the container looks for it, and the port is
	// the one that it listens on.
	require.Equal(t, byKind["ConfigMap"].Metadata.Name, pod.Volumes[0].ConfigMap.Name)
	require.Equal(t, pod.Volumes[0].Name, container.Mounts[0].Name)
	require.Equal(t, []string{"run", path.Join(container.Mounts[0].MountPath, "config.yaml")}, container.Args)
	config := byKind["ConfigMap"].Data["config.yaml"]
	ports := make(map[string]int)
	for _, p := range container.Port {
		ports[p.Name] = p.ContainerPort
	}
	require.Equal(t, map[string]int{"cryo": 8080, "http": 4195}, ports)
	require.Contains(t, config, "address: ${CRYO_ADDRESS:0.0.0.0:"+strconv.Itoa(ports["cryo"])+"}")
	require.Equal(t, "cryo", byKind["Service"].Spec.Ports[0].TargetPort)
	for _, env := range container.Env {
		require.Contains(t, config, "${"+env.Name+"}")
	}
	var pods struct {
		MatchLabels map[string]string `yaml:"matchLabels"`
	}
	selector := byKind["Deployment"].Spec.Selector
	require.NoError(t, selector.Decode(&pods))
	require.Equal(t, byKind["Deployment"].Spec.Template.Metadata.Labels, pods.MatchLabels)
	selector = byKind["Service"].Spec.Selector
	labels := make(map[string]string)
	require.NoError(t, selector.Decode(&labels))
	require.Equal(t, pods.MatchLabels, labels)

	// It ends by itself before it is ended, and runs as the image's user.
	require.Greater(t, time.Duration(pod.Grace)*time.Second, shutdown(t, config))
	require.True(t, pod.SecurityContext.RunAsNonRoot)
	require.Equal(t, strconv.Itoa(pod.SecurityContext.RunAsUser), strings.Split(instruction(t, "USER"), ":")[0])

	// It runs, and the probes see it.
	k, api := runKafka(t, "events"), freeAddress(t)
	file := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte(config), 0o600))
	env := []string{"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN=" + token, "KAFKA_BROKERS=" + k.brokers()}
	wantLinted(t, file, env...)
	p := launch(t, nil, env, "run", "--set", "http.address="+api, "--set", "shutdown_delay=0s", file)
	address := p.wantLogged("Listening for Cryo clients on ")
	var paths []string
	for _, probe := range []probe{container.Startup, container.Liveness, container.Readiness} {
		require.Equal(t, "http", probe.HTTPGet.Port)
		paths = append(paths, probe.HTTPGet.Path)
		require.EventuallyWithT(t, func(c *assertT) {
			out, err := exec.Command(binary, "probe", "http://"+api+probe.HTTPGet.Path).CombinedOutput()
			require.NoError(c, err, string(out))
		}, patience, 50*time.Millisecond)
	}
	require.Equal(t, []string{"/ping", "/ping", "/ready"}, paths)
	require.NoError(t, next(t, send(dial(t, address), "hello")))
	require.Equal(t, map[string]int{"hello": 1}, k.texts(t, "events"))
	p.interrupt()
}
