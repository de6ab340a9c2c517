package plugin

import (
	"fmt"
	"time"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure" // the lint rules use its Bloblang methods
	"github.com/redpanda-data/benthos/v4/public/service"
)

// aboutCryo begins the description of every component.
const aboutCryo = "Cryo is a small protocol over WebSocket. Its two ends send each other messages, of text or bytes, and the receiver acknowledges each of them by its number; files and large data travel as named streams. A connection between a client and a server is called a session. "

// aboutMetrics ends it.
const aboutMetrics = `
== Metrics

Beside the engine's metrics for every component there are those whose names begin with ` + "`cryo_`" + `: sessions, messages and bytes by their type, what waits for its acknowledgement and for how long, what was rejected or came too late, streams. https://github.com/cryo-connect/cryo-connect/blob/main/docs/metrics.md[The list^] says what each of them means and which to watch.
`

// What fields of several components have in common. A value that is wrong is
// said so twice, by lint and at start, because a file may be run unlinted.

// positiveInt is a number that has to be at least one.
func positiveInt(name string) *service.ConfigField {
	return positive(name, service.NewIntField(name))
}

func positive(name string, f *service.ConfigField) *service.ConfigField {
	return f.LintRule(fmt.Sprintf(`root = if this.type() == "number" && this < 1 { "field %s has to be at least 1, got %%v".format(this) }`, name))
}

func fieldPositive(conf *service.ParsedConfig, name string) (int, error) {
	n, err := conf.FieldInt(name)
	if err == nil && n < 1 {
		err = fmt.Errorf("field %s has to be at least 1, got %d", name, n)
	}
	return n, err
}

// positiveDuration is a duration that has to be above zero.
func positiveDuration(name string) *service.ConfigField {
	return service.NewDurationField(name).LintRule(fmt.Sprintf(`
let nanoseconds = this.parse_duration().catch(null)
root = if this.type() == "string" && $nanoseconds == null { "field %[1]s has to be a duration such as 5s, got %%v".format(this) } else if this.type() == "string" && $nanoseconds <= 0 { "field %[1]s has to be above zero, got %%v".format(this) }`, name))
}

func fieldPositiveDuration(conf *service.ParsedConfig, name string) (time.Duration, error) {
	d, err := conf.FieldDuration(name)
	switch {
	case err != nil:
		return 0, fmt.Errorf("field %s has to be a duration such as 5s: %w", name, err)
	case d <= 0:
		return 0, fmt.Errorf("field %s has to be above zero, got %v", name, d)
	default:
		return d, nil
	}
}
