package plugin

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"
)

// Random pipelines for the property of delivery: real processors and outputs of
// the engine, our own components, and sinks that fail.

// conf is a component's configuration.
type conf = map[string]any

// processor is a processor with what it does to a batch.
type processor struct {
	conf      conf
	misplaces bool // messages have the contexts of others behind it
	splits    bool // makes several batches of one
}

// out is an output, with the outputs in it.
type out struct {
	kind       string // the component's name
	pattern    string // of a broker
	name       string // of a leaf that delivers
	fields     conf
	children   []*out
	cases      []conf // of a switch: what is beside each output
	processors []processor
	batching   conf // nil: none
	batched    []processor
}

// walk visits an output and all in it.
func (o *out) walk(visit func(*out)) {
	visit(o)
	for _, child := range o.children {
		child.walk(visit)
	}
}

// pipelineSpec is all there is to know of a pipeline: it is made from a seed, and
// made smaller when it shows a fault.
type pipelineSpec struct {
	seed       uint64 // of the choices while it runs
	input      string // cryo, cryo_server or feed
	fields     conf
	replay     bool
	streams    string // the scanner; empty: messages only
	clients    int
	jobs       []job
	processors []processor
	output     *out
	faults     int // virtual milliseconds until everything works
}

// job is what one sender sends at a time: a burst of messages, or a stream of lines.
type job struct {
	ids    []string
	stream bool
	wait   int // virtual milliseconds before it
}

// The first letter of an id decides about the message.
const (
	letters  = "abc"
	dropped  = "x" // by the filters, on purpose
	rejected = "r" // by a switch, for good; where messages are not redelivered
	oversize = "z" // dropped by bounds_check
)

var idPattern = `[a-z]-[0-9]+`

// generator makes random choices.
type generator struct {
	*rand.Rand
	spec    *pipelineSpec
	leaves  int
	network int // leaves with their own peers
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

func choose[T any](g *generator, of ...T) T { return of[g.IntN(len(of))] }

// newPipeline makes the pipeline of a seed. What no component of ours can prevent is
// left out.
func newPipeline(seed uint64) *pipelineSpec {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 0))}
	for {
		spec := g.pipeline(seed)
		if unpreventable(spec) == "" && !spec.endless() {
			return spec
		}
	}
}

// endless reports whether a message that is rejected for what it is, or for a failed
// processor, is retried as it is for ever.
func (s *pipelineSpec) endless() bool {
	rejects := func(o *out) bool { return o.kind == "reject" || o.kind == "reject_errored" }
	return s.output.any(func(o *out) bool { return (o.kind == "retry" || o.retries()) && o.any(rejects) })
}

func (g *generator) pipeline(seed uint64) *pipelineSpec {
	spec := &pipelineSpec{seed: seed, input: choose(g, "cryo", "cryo_server", "cryo_server", "feed"), clients: 1, replay: true, faults: g.IntN(15_000)}
	g.spec, g.leaves, g.network = spec, 0, 0
	if spec.input != "feed" {
		spec.replay = g.chance(70)
		spec.fields = conf{
			"max_batch_count": choose(g, 1, 2, 8, 64), "max_in_flight": choose(g, 2, 16, 64, 1024), "auto_replay_nacks": spec.replay,
		}
		if g.chance(40) {
			spec.streams = choose(g, "lines", "to_the_end")
			spec.fields["streams"] = conf{"scanner": conf{spec.streams: conf{}}}
		}
	}
	if spec.input == "cryo_server" {
		spec.clients = 1 + g.IntN(3)
		if g.chance(15) {
			spec.fields["message_types"] = []string{"utf8", "binary", "stream", "session"}
		}
	}
	for i := range g.IntN(4) {
		spec.processors = append(spec.processors, g.processor(2, i == 0 && spec.streams == ""))
	}
	if spec.input == "feed" {
		spec.output = g.ownLeaf()
	} else {
		spec.output = g.output(3)
	}
	g.jobs()
	return spec
}

// jobs makes the messages to be sent.
func (g *generator) jobs() {
	alphabet := letters + dropped + oversize
	if !g.spec.replay {
		alphabet += rejected
	}
	n := 0
	for range 2 + g.IntN(6) {
		j := job{stream: g.spec.streams != "" && g.chance(40), wait: choose(g, 0, 0, g.IntN(500))}
		for range 1 + g.IntN(12) {
			letter := string(alphabet[g.IntN(len(alphabet))])
			if j.stream && letter == oversize {
				letter = dropped
			}
			j.ids = append(j.ids, fmt.Sprintf("%s-%d", letter, n))
			n++
		}
		g.spec.jobs = append(g.spec.jobs, j)
	}
}

const (
	isDropped     = `content().string().split("\n").all(line -> line.has_prefix("` + dropped + `-"))`
	isRejected    = `content().has_prefix("` + rejected + `-")`
	filterMapping = `root = if ` + isDropped + ` { deleted() }`
	groupValue    = `${! content().string().re_replace_all("(?s)-.*", "") }`
)

// processor makes a processor with others in it. first is true where each message is
// still as it was sent.
func (g *generator) processor(depth int, first bool) processor {
	all := []func() processor{
		func() processor { return processor{conf: conf{"mapping": filterMapping}, misplaces: true} },
		func() processor { return processor{conf: conf{"mapping": filterMapping}, misplaces: true} },
		func() processor { return processor{conf{"split": conf{"size": 1 + g.IntN(3)}}, true, true} },
		func() processor { return processor{conf{"group_by_value": conf{"value": groupValue}}, true, true} },
		func() processor { return processor{conf: conf{"archive": conf{"format": "lines"}}, misplaces: true} },
		func() processor { return processor{conf: conf{"unarchive": conf{"format": "lines"}}} },
		func() processor { return processor{conf: conf{"flaky": conf{}}} },
		func() processor { return processor{conf: conf{"sleep": conf{"duration": choose(g, "1ms", "20ms")}}} },
		func() processor {
			parts := g.Perm(4)
			for i := 4; i < 100; i++ {
				parts = append(parts, i)
			}
			if g.chance(50) {
				parts = slices.Insert(parts, 0, 0) // the first one twice
			}
			return processor{conf: conf{"select_parts": conf{"parts": parts}}, misplaces: true}
		},
		func() processor {
			return processor{conf: conf{"insert_part": conf{"index": choose(g, 0, 1, -1), "content": "inserted"}}, misplaces: true}
		},
	}
	if first {
		all = append(all, func() processor {
			bound := conf{"bounds_check": conf{"max_part_size": oversizeBytes - 1}}
			return processor{conf: conf{choose(g, "for_each", "try"): []conf{bound}}, misplaces: true}
		})
	}
	if depth > 0 {
		nested := func() (confs []conf, misplaces bool) {
			for range 1 + g.IntN(2) {
				p := g.processor(depth-1, false)
				confs, misplaces = append(confs, p.conf), misplaces || p.misplaces
			}
			return confs, misplaces
		}
		all = append(all,
			func() processor {
				a, misplacesA := nested()
				b, misplacesB := nested()
				cases := []conf{
					{"check": g.check(), "processors": a, "fallthrough": g.chance(20)},
					{"processors": b},
				}
				return processor{conf: conf{"switch": cases}, misplaces: misplacesA || misplacesB}
			},
			func() processor {
				list, misplaces := nested()
				return processor{conf: conf{choose(g, "try", "catch", "for_each"): list}, misplaces: misplaces}
			},
			func() processor {
				list, misplaces := nested()
				return processor{conf: conf{"parallel": conf{"cap": g.IntN(4), "processors": list}}, misplaces: misplaces}
			},
			func() processor {
				list, misplaces := nested()
				backoff := conf{"initial_interval": "10ms", "max_interval": "50ms", "max_elapsed_time": "0s"}
				return processor{
					conf:      conf{"retry": conf{"backoff": backoff, "max_retries": 3, "parallel": g.chance(50), "processors": list}},
					misplaces: misplaces,
				}
			},
			func() processor {
				list, _ := nested()
				groups := []conf{{"check": g.check(), "processors": list}, {"check": g.check()}}
				return processor{conf{"group_by": groups}, true, true}
			},
			// What comes out of a branch goes onto the messages that went in, so it
			// misplaces nothing.
			func() processor { return processor{conf: conf{"branch": g.branch()}} },
			func() processor {
				return processor{conf: conf{"workflow": conf{"meta_path": "", "branches": conf{"one": g.branch(), "two": g.branch()}}}}
			},
		)
	}
	return all[g.IntN(len(all))]()
}

func (g *generator) branch() conf {
	return conf{
		"request_map": "root = content()",
		"processors":  []conf{choose(g, conf{"flaky": conf{}}, conf{"sleep": conf{"duration": "1ms"}}, conf{"mapping": "root = content()"})},
		"result_map":  `meta branch = "done"`,
	}
}

// check is a condition that both some messages meet and some don't.
func (g *generator) check() string {
	return choose(g, `content().has_prefix("a")`, `content().has_prefix("b")`, `content().has_prefix("x")`, `@mood == "bad"`, `errored()`)
}

// misplacing reports whether one of the processors does, splitting whether one splits.
func misplacing(list []processor) bool {
	return slices.ContainsFunc(list, func(p processor) bool { return p.misplaces })
}

func splitting(list []processor) bool {
	return slices.ContainsFunc(list, func(p processor) bool { return p.splits })
}

// output makes an output with others in it.
func (g *generator) output(depth int) *out {
	o := g.bare(depth)
	if g.chance(15) && o.kind != "reject" {
		for range 1 + g.IntN(2) {
			o.processors = append(o.processors, g.processor(1, false))
		}
	}
	return o
}

func (g *generator) bare(depth int) *out {
	if depth == 0 || g.leaves > 4 || g.chance(30) {
		return g.leaf()
	}
	child := func() *out { return g.output(depth - 1) }
	children := func() []*out {
		list := []*out{child(), child()}
		if g.chance(20) {
			list = append(list, child())
		}
		return list
	}
	switch g.IntN(8) {
	case 0, 1:
		o := &out{kind: "switch", fields: conf{"retry_until_success": g.chance(20)}}
		if g.chance(60) {
			check := choose(g, `errored()`, `@mood == "bad"`)
			if !g.spec.replay && g.chance(50) {
				check = isRejected
			}
			o.add(conf{"check": check}, &out{kind: "reject"})
		}
		if o.children != nil {
			o.fields["retry_until_success"] = false // lint wants it
		}
		if o.children == nil || g.chance(50) {
			o.add(conf{"check": g.check(), "continue": g.chance(20)}, child())
		}
		o.add(conf{}, child())
		return o
	case 2, 3:
		o := &out{
			kind: "broker", children: children(), fields: conf{},
			pattern: choose(g, "fan_out", "fan_out_fail_fast", "fan_out_sequential", "fan_out_sequential_fail_fast", "round_robin", "greedy"),
		}
		if g.chance(20) {
			g.batch(o)
		}
		return o
	case 4:
		return &out{kind: "fallback", children: children()}
	case 5:
		return &out{kind: "retry", children: []*out{child()}, fields: conf{"backoff": conf{"initial_interval": "50ms", "max_interval": "1s", "max_elapsed_time": "0s"}}}
	case 6:
		return &out{kind: "reject_errored", children: []*out{child()}}
	default:
		if g.chance(40) { // What it drops counts as delivered, so it holds a sink, which knows.
			sink := g.sink()
			sink.fields["forgiven"] = true
			return &out{kind: "drop_on", children: []*out{sink}, fields: conf{"error": true}}
		}
		return &out{kind: "drop_on", children: []*out{child()}, fields: conf{"error": false, "error_patterns": []string{"^never$"}}}
	}
}

// add adds a case to a switch.
func (o *out) add(fields conf, child *out) {
	o.cases, o.children = append(o.cases, fields), append(o.children, child)
}

func (g *generator) leaf() *out {
	if g.network < 2 && g.chance(40) {
		return g.ownLeaf()
	}
	if g.chance(5) {
		return &out{kind: "drop"}
	}
	return g.sink()
}

func (g *generator) sink() *out {
	g.leaves++
	o := &out{kind: "sink", name: fmt.Sprintf("sink%d", g.leaves)}
	o.fields = conf{
		"name": o.name, "fails": choose(g, "never", "whole", "whole", "single", "single"), "percent": choose(g, 10, 30, 60),
		"max_in_flight": choose(g, 1, 1, 4, 16),
	}
	if g.chance(25) {
		g.batch(o)
	}
	return o
}

// ownLeaf is one of our outputs, whose peers the test has.
func (g *generator) ownLeaf() *out {
	g.leaves++
	g.network++
	o := &out{kind: choose(g, "cryo", "cryo_server"), name: fmt.Sprintf("peer%d", g.leaves)}
	address := fmt.Sprintf("192.0.2.%d:80", 10+g.network)
	o.fields = conf{"ack_timeout": choose(g, "500ms", "2s"), "message_type": choose(g, "auto", "auto", "binary", "stream")}
	if o.kind == "cryo" {
		o.fields["url"], o.fields["token"] = "ws://"+address, token
		// With several writers without a session the engine's mutex would stop virtual
		// time: the one that has it sleeps.
		o.fields["max_in_flight"] = 1
	} else {
		o.fields["address"], o.fields["tokens"] = address, []string{token}
		o.fields["max_in_flight"] = choose(g, 1, 4, 16)
		o.fields["send_to"] = choose(g, "all", "any", "session", "match")
		o.fields["no_session"] = choose(g, "wait", "reject")
		switch o.fields["send_to"] {
		case "session":
			o.fields["session_id"] = "1"
		case "match":
			o.fields["match"] = `root = @cryo_session.cryo_session_id != "2"`
		case "any":
			o.fields["max_in_flight_per_session"] = choose(g, 1, 4, 16)
		}
	}
	if g.chance(40) {
		g.batch(o)
	}
	return o
}

// batch gives an output a batching policy.
func (g *generator) batch(o *out) {
	o.batching = conf{"count": 2 + g.IntN(10), "period": choose(g, "5ms", "100ms")}
	if g.chance(40) {
		o.batched = append(o.batched, g.processor(1, false))
	}
}

// conf renders an output.
func (o *out) conf() conf {
	fields := make(conf)
	maps.Copy(fields, o.fields)
	var children []conf
	for _, child := range o.children {
		children = append(children, child.conf())
	}
	if o.batching != nil {
		batching := maps.Clone(o.batching)
		if len(o.batched) > 0 {
			batching["processors"] = confsOf(o.batched)
		}
		fields["batching"] = batching
	}
	var value any = fields
	switch o.kind {
	case "switch":
		var cases []conf
		for i, beside := range o.cases {
			c := conf{"output": children[i]}
			maps.Copy(c, beside)
			cases = append(cases, c)
		}
		fields["cases"] = cases
	case "broker":
		fields["pattern"], fields["outputs"] = o.pattern, children
	case "fallback":
		value = children
	case "retry", "drop_on":
		fields["output"] = children[0]
	case "reject_errored":
		value = children[0]
	case "reject":
		value = "not wanted"
	}
	rendered := conf{o.kind: value}
	if len(o.processors) > 0 {
		rendered["processors"] = confsOf(o.processors)
	}
	return rendered
}

func confsOf(list []processor) []conf {
	confs := make([]conf, len(list))
	for i, p := range list {
		confs[i] = p.conf
	}
	return confs
}

func inYAML(value any) string {
	text, err := yaml.Marshal(value)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// inputConf is the input's configuration.
func (s *pipelineSpec) inputConf() conf {
	fields := conf{}
	maps.Copy(fields, s.fields)
	switch s.input {
	case "cryo":
		fields["url"], fields["token"] = "ws://"+somewhere, token
	case "cryo_server":
		fields["address"], fields["tokens"] = somewhere, []string{token}
	}
	return conf{s.input: fields}
}

// String is the configuration, and what is sent.
func (s *pipelineSpec) String() string {
	var b strings.Builder
	whole := conf{"input": s.inputConf(), "output": s.output.conf()}
	if len(s.processors) > 0 {
		whole["pipeline"] = conf{"processors": confsOf(s.processors)}
	}
	b.WriteString(inYAML(whole))
	fmt.Fprintf(&b, "# %d clients; faults for %d ms\n", s.clients, s.faults)
	for i, j := range s.jobs {
		fmt.Fprintf(&b, "# job %d of client %d: after %d ms, stream %v: %v\n", i, i%s.clients, j.wait, j.stream, j.ids)
	}
	return b.String()
}

// has reports whether a text is anywhere in it.
func (s *pipelineSpec) has(text string) bool { return strings.Contains(s.String(), text) }
