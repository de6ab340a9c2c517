package plugin

import (
	"fmt"

	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// CheckListeners returns an error if cryo_server components of a configuration have the same address, and
// differ in a setting of the listener that they share. Call it before the pipelines start: the component
// that opens the listener first would decide whose settings apply, such as those that deny clients. It does
// not see components of templates, and of files of streams mode: the second component with an address
// fails to connect then.
func CheckListeners(conf *service.ParsedConfig) error {
	first := make(map[string]*serverComponent)
	for _, root := range []struct {
		kind, field string
		spec        *service.ConfigSpec
	}{
		{"input", "input", specsOnce.serverInput()},
		{"input", "input_resources", specsOnce.serverInput()},
		{"output", "output", specsOnce.serverOutput()},
		{"output", "output_resources", specsOnce.serverOutput()},
	} {
		value, err := conf.FieldAny(root.field)
		if err != nil {
			continue // the configuration of streams mode has no pipeline
		}
		err = eachServer(root.field, value, func(path string, config any) error {
			c := &serverComponent{name: root.kind + " cryo_server at " + path, log: conf.Resources().Logger()}
			text, err := yaml.Marshal(config)
			if err != nil {
				return err
			}
			parsed, err := root.spec.ParseYAML(string(text), nil)
			if err == nil {
				c.settings, _, err = listenSettingsFromParsed(parsed, &c.processors, c.log)
			}
			if err != nil {
				return nil //nolint:nilerr // building the component returns the same error
			}
			if other := first[c.settings.Address]; other != nil {
				return other.checkSettings(c)
			}
			first[c.settings.Address] = c
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// eachServer calls f for each configuration of a cryo_server within a value of a configuration.
func eachServer(path string, value any, f func(path string, config any) error) error {
	switch v := value.(type) {
	case *yaml.Node:
		var decoded any
		if err := v.Decode(&decoded); err != nil {
			return nil //nolint:nilerr // the engine reports it
		}
		return eachServer(path, decoded, f)
	case map[string]any:
		for name, child := range v {
			if name == "cryo_server" {
				if err := f(path, child); err != nil {
					return err
				}
			} else if err := eachServer(path+"."+name, child, f); err != nil {
				return err
			}
		}
	case []any:
		for i, child := range v {
			if err := eachServer(fmt.Sprintf("%s.%d", path, i), child, f); err != nil {
				return err
			}
		}
	}
	return nil
}
