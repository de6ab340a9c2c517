// Command docsgen writes the reference pages of the components, one Markdown file each,
// from the specifications with which they are registered:
//
//	docsgen docs/reference/components
//
// "go generate ./..." runs it; CI fails if the pages differ.
package main

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"path"
	"regexp"
	"strings"
	"text/template"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure" // the scanner to_the_end, a default
	"github.com/redpanda-data/benthos/v4/public/service"

	_ "github.com/cryo-connect/cryo-connect/plugin"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: docsgen directory")
	}
	if err := write(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

// write writes all pages into dir, which must exist.
func write(dir string) error {
	pages, err := render()
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	for name, page := range pages {
		if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return err
		}
		if err := root.WriteFile(name, page, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// render returns the pages of our components, by file name.
func render() (map[string][]byte, error) {
	var (
		env   = service.GlobalEnvironment()
		pages = make(map[string][]byte)
		errs  []error
	)
	walk := func(kind string) func(name string, config *service.ConfigView) {
		return func(name string, config *service.ConfigView) {
			if !strings.HasPrefix(name, "cryo") {
				return
			}
			page, err := renderComponent(config)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s %s: %w", kind, name, err))
			}
			pages[kind+"/"+name+".md"] = page
		}
	}
	env.WalkInputs(walk("inputs"))
	env.WalkOutputs(walk("outputs"))
	return pages, errors.Join(errs...)
}

//go:embed component.md.tmpl
var pageText string

var page = template.Must(template.New("component").Funcs(template.FuncMap{
	"markdown": markdown,
	"trim":     strings.TrimSpace,
}).Parse(pageText))

// component is the data of a page.
type component struct {
	service.TemplateDataPlugin
	Fields []field
}

// field is a field with the properties that the engine's template data omits.
type field struct {
	service.TemplateDataPluginField
	Type     string
	Advanced bool
	Required bool
}

func renderComponent(config *service.ConfigView) ([]byte, error) {
	data, err := config.TemplateData()
	if err != nil {
		return nil, err
	}
	c := component{TemplateDataPlugin: data}
	if c.Fields, err = fieldsOf(config, data.Fields); err != nil {
		return nil, err
	}
	var b strings.Builder
	if err := page.Execute(&b, c); err != nil {
		return nil, err
	}
	return []byte(b.String()), nil
}

// spec is a field of the specification as the engine writes it in JSON.
type spec struct {
	Name     string `json:"name"`
	Type     string `json:"type"`
	Kind     string `json:"kind"`
	Advanced bool   `json:"is_advanced"`
	Optional bool   `json:"is_optional"`
	Default  *any   `json:"default"`
	Children []spec `json:"children"`
}

// fieldsOf adds the properties that only the specification has.
func fieldsOf(config *service.ConfigView, data []service.TemplateDataPluginField) ([]field, error) {
	raw, err := config.FormatJSON()
	if err != nil {
		return nil, err
	}
	var root struct {
		Config spec `json:"config"`
	}
	if err := json.Unmarshal(raw, &root); err != nil {
		return nil, err
	}
	specs := make(map[string]field)
	root.Config.collect("", false, specs)
	fields := make([]field, len(data))
	for i, d := range data {
		f, ok := specs[d.FullName]
		if !ok {
			return nil, fmt.Errorf("field %s is in the template data, but not in the specification", d.FullName)
		}
		f.TemplateDataPluginField = d
		fields[i] = f
	}
	return fields, nil
}

// collect adds a field's children to into, by the full names that the engine uses.
func (s *spec) collect(path string, advanced bool, into map[string]field) {
	for _, child := range s.Children {
		name, advanced := path+child.Name, advanced || child.Advanced
		below := name
		kind := child.typeName()
		switch child.Kind {
		case "array":
			below, kind = name+"[]", "list of "+child.elementType()
		case "map":
			below, kind = name+".<name>", "map of "+child.elementType()
		}
		into[name] = field{
			Type:     kind,
			Advanced: advanced,
			Required: child.Default == nil && !child.Optional && len(child.Children) == 0,
		}
		child.collect(below+".", advanced, into)
	}
}

// elementType is the type of the elements of a list or an object. Secrets are of the type unknown,
// as package plugin explains.
func (s *spec) elementType() string {
	if s.Type == "unknown" {
		return "string"
	}
	return s.Type
}

// typeName is the type of a field's values. Fields for whole numbers, booleans and secrets are of
// the type unknown, as package plugin explains; their defaults show what they are.
func (s *spec) typeName() string {
	if s.Type == "unknown" && s.Default != nil {
		switch (*s.Default).(type) {
		case float64:
			return "int"
		case bool:
			return "bool"
		case string:
			return "string"
		}
	}
	return s.Type
}

var (
	heading   = regexp.MustCompile(`(?m)^=(=+) `)
	reference = regexp.MustCompile(`xref:([a-z_]+):([a-z_/]+)\.adoc(#[a-z_-]+)?\[([^\]]*)\]`)
	link      = regexp.MustCompile(`(https?://[^\s\[\]]+)\[([^\]^]*)\^?\]`)
)

// markdown converts descriptions from the engine's dialect of AsciiDoc into Markdown.
func markdown(text string) string {
	text = heading.ReplaceAllStringFunc(text, func(h string) string {
		return strings.ReplaceAll(h, "=", "#")
	})
	text = link.ReplaceAllString(text, "[$2]($1)")
	text = reference.ReplaceAllString(text, "[$4](https://docs.redpanda.com/redpanda-connect/$1/$2/$3)")
	return strings.TrimSpace(text)
}
