// Command validate reads a deployment file as the tool that the file is for does,
// and writes what that tool understood as JSON, or fails with the tool's error:
//
//	validate dockerfile Dockerfile      # BuildKit's parser and its lint rules
//	validate compose    compose.yaml    # Compose's loader and schema; variables come from the environment
//	validate kubernetes manifest.yaml   # strict decoding into the Kubernetes API types
//
// It has its own module, so that these tools raise no version beneath the
// engine. tests/deploy_test.go runs it.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: validate dockerfile|compose|kubernetes FILE")
	}
	read, ok := map[string]func(file string) (any, error){
		"dockerfile": dockerfile, "compose": compose, "kubernetes": kubernetes,
	}[os.Args[1]]
	if !ok {
		log.Fatalf("unknown kind of file: %s", os.Args[1])
	}
	content, err := read(os.Args[2])
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(content)
	}
	if err != nil {
		log.Fatalf("%s: %v", os.Args[2], err)
	}
}

// image is what a Dockerfile's last stage becomes.
type image struct {
	Stages      []string          // the base of each stage
	Run         []string          // the commands of all stages
	User        string            // USER
	Env         map[string]string // ENV
	Expose      []string          // EXPOSE
	Entrypoint  []string          // ENTRYPOINT; its exec form
	Cmd         []string          // CMD; its exec form
	Healthcheck []string          // HEALTHCHECK, with CMD or CMD-SHELL first
}

// dockerfile fails on what BuildKit rejects, and on what its linter warns of.
func dockerfile(file string) (any, error) {
	content, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	parsed, err := parser.Parse(content)
	if err != nil {
		return nil, err
	}
	var problems []error
	for _, w := range parsed.Warnings {
		problems = append(problems, errors.New(w.Short))
	}
	rules := linter.New(&linter.Config{Warn: func(rule, _, _, message string, _ []parser.Range) {
		problems = append(problems, fmt.Errorf("%s: %s", rule, message))
	}})
	stages, _, err := instructions.Parse(parsed.AST, rules)
	if err = errors.Join(append(problems, err)...); err != nil {
		return nil, err
	}
	var all, last image
	for _, stage := range stages {
		all.Stages = append(all.Stages, stage.BaseName)
		last = image{Env: make(map[string]string)}
		for _, command := range stage.Commands {
			switch c := command.(type) {
			case *instructions.RunCommand:
				all.Run = append(all.Run, strings.Join(c.CmdLine, " "))
			case *instructions.UserCommand:
				last.User = c.User
			case *instructions.EnvCommand:
				for _, variable := range c.Env {
					last.Env[variable.Key] = variable.Value
				}
			case *instructions.ExposeCommand:
				last.Expose = c.Ports
			case *instructions.EntrypointCommand:
				last.Entrypoint = execForm(c.ShellDependantCmdLine)
			case *instructions.CmdCommand:
				last.Cmd = execForm(c.ShellDependantCmdLine)
			case *instructions.HealthCheckCommand:
				last.Healthcheck = c.Health.Test
			}
		}
	}
	last.Stages, last.Run = all.Stages, all.Run
	return last, nil
}

// execForm is nil for a command that a shell runs.
func execForm(line instructions.ShellDependantCmdLine) []string {
	if line.PrependShell {
		return nil
	}
	return line.CmdLine
}

// compose loads all services, those behind a profile included.
func compose(file string) (any, error) {
	options, err := cli.NewProjectOptions([]string{file}, cli.WithOsEnv, cli.WithProfiles([]string{"*"}))
	if err != nil {
		return nil, err
	}
	return options.LoadProject(context.Background())
}

// kubernetes decodes every document of a file, and rejects unknown kinds, and
// unknown and repeated fields.
func kubernetes(file string) (any, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), appsv1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(content)))
	var objects []runtime.Object
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			return nil, err
		}
		objects = append(objects, object)
	}
}
