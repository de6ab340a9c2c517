package plugin

import (
	"fmt"

	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// CheckListeners returns an error if cryo_server components of a configuration have the same address, and
// differ in a setting of the listener that they share. Call it before the pipelines start: the component
// that opens the listener first would decide whose settings apply, such as those that deny clients. It does
// not see components of templates, of resource files, and of files of streams mode: the second component
// with an address fails to connect then. Resources that no component of the pipeline uses do not count.
func CheckListeners(conf *service.ParsedConfig) error {
	first := make(map[string]*serverComponent)
	for _, root := range []struct {
		kind string
		spec *service.ConfigSpec
	}{
		{"input", specsOnce.serverInput()},
		{"output", specsOnce.serverOutput()},
	} {
		servers := servers{resources: make(map[string]resource), each: func(path string, config any) error {
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
		}}
		field := root.kind + "_resources"
		resources, _ := conf.FieldAny(field)
		pipeline, err := conf.FieldAny(root.kind)
		if err == nil {
			servers.addResources(field, resources)
			err = servers.find(root.kind, pipeline)
		} else { // the configuration of streams mode has no pipeline
			err = servers.find(field, resources)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// servers finds the cryo_server components of one kind in a configuration.
type servers struct {
	each      func(path string, config any) error // called for each of them
	resources map[string]resource                 // by label; those that are not used so far
}

type resource struct {
	path  string
	value any
}

func (s *servers) addResources(field string, value any) {
	list, _ := plain(value).([]any)
	for i, element := range list {
		object, _ := plain(element).(map[string]any)
		if label, ok := object["label"].(string); ok {
			s.resources[label] = resource{fmt.Sprintf("%s.%d", field, i), object}
		}
	}
}

// find calls each for the components within a value of the configuration, and within the resources that
// it uses.
func (s *servers) find(path string, value any) error {
	switch v := plain(value).(type) {
	case map[string]any:
		for name, child := range v {
			if err := s.findField(path, name, child); err != nil {
				return err
			}
		}
	case []any:
		for i, child := range v {
			if err := s.find(fmt.Sprintf("%s.%d", path, i), child); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *servers) findField(path, name string, child any) error {
	if name == "cryo_server" {
		return s.each(path, child)
	}
	if label, ok := plain(child).(string); ok && name == "resource" {
		used := s.resources[label]
		delete(s.resources, label)
		return s.find(used.path, used.value)
	}
	return s.find(path+"."+name, child)
}

// plain returns a value of a configuration without types of YAML; nil if it cannot be decoded, which the
// engine reports.
func plain(value any) any {
	node, ok := value.(*yaml.Node)
	if !ok {
		return value
	}
	var decoded any
	if err := node.Decode(&decoded); err != nil {
		return nil
	}
	return decoded
}
