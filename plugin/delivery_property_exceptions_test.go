package plugin

import (
	"slices"
	"strings"
)

// What no component of ours can prevent, because the engine attributes errors by
// contexts that it has put onto other messages. The generator makes no such pipelines.
//
// An error can name single messages (a BatchError). It is used by whoever has merged
// or kept batches: an engine input that retries what failed, the batcher in front of an
// output, and fallback, which hands on what failed. If a processor between the two
// misplaces contexts, it hits the wrong message.

// unpreventable returns the exception that a pipeline is, or nothing.
func unpreventable(s *pipelineSpec) string {
	for _, exception := range []struct {
		name string
		is   func(*pipelineSpec) bool
	}{
		{"engine input, processors that misplace contexts, single failures", engineInputBehindMisplacing},
		{"engine input, a broker that fails fast, single failures", engineInputBehindFailFast},
		{"batching processors that misplace contexts, single failures", batchingMisplaces},
		{"batching processors that make several messages of one, single failures", batchingExpands},
		{"a broker's batching, an output's processors that misplace contexts, single failures", brokerBatchingAboveMisplacing},
		{"fallback, a tier's processors that misplace contexts, single failures", fallbackAboveMisplacing},
		{"a broker that fails fast and single failures under fallback or batching", failFastUnderAttribution},
		{"a broker that fails fast under an output that expects one verdict", failFastUnderOneVerdict},
	} {
		if exception.is(s) {
			return exception.name
		}
	}
	return ""
}

// namesSingles reports whether the error of an output may name single messages of a
// batch.
func (o *out) namesSingles() bool {
	return splitting(o.processors) && o.fails() || o.namesSinglesItself()
}

// namesSinglesItself is without the output's own processors.
func (o *out) namesSinglesItself() bool {
	if o.batching != nil {
		return false // its batcher reduces errors to one for each batch that came in
	}
	switch o.kind {
	case "sink":
		return o.fields["fails"] == "single" && !o.forgiven()
	case "switch", "reject_errored":
		return o.fails()
	case "fallback":
		return o.children[len(o.children)-1].namesSingles()
	case "retry":
		return false // it never fails
	case "broker":
		return !o.retries() && o.anyChild((*out).namesSingles)
	case "drop_on":
		return o.anyChild((*out).namesSingles)
	default:
		return false // ours
	}
}

// misplacesSingles reports whether the error of an output names single messages, and
// processors in it have put the contexts of others onto these.
func (o *out) misplacesSingles() bool {
	if misplacing(o.processors) && (o.namesSinglesItself() || splitting(o.processors) && o.fails()) {
		return true
	}
	switch {
	case o.batching != nil, o.kind == "retry", o.retries():
		return false
	case o.kind == "fallback":
		return o.children[len(o.children)-1].misplacesSingles()
	default:
		return o.anyChild((*out).misplacesSingles)
	}
}

// fails reports whether an output may fail at all.
func (o *out) fails() bool {
	switch o.kind {
	case "sink":
		return o.fields["fails"] != "never" && !o.forgiven()
	case "drop", "retry":
		return false
	case "fallback":
		return o.children[len(o.children)-1].fails()
	case "reject", "cryo", "cryo_server", "reject_errored":
		return true
	default:
		return !o.retries() && o.anyChild((*out).fails)
	}
}

// retries reports whether a broker or switch wraps its outputs so that they never fail.
func (o *out) retries() bool {
	return o.pattern == "fan_out" || o.pattern == "fan_out_sequential" || o.fields["retry_until_success"] == true
}

func (o *out) failsFast() bool {
	return o.pattern == "fan_out_fail_fast" || o.pattern == "fan_out_sequential_fail_fast"
}

// forgiven is a sink whose failures drop_on turns into success.
func (o *out) forgiven() bool { return o.fields["forgiven"] == true }

func (o *out) anyChild(is func(*out) bool) bool { return slices.ContainsFunc(o.children, is) }

func (o *out) any(is func(*out) bool) (found bool) {
	o.walk(func(inner *out) { found = found || is(inner) })
	return found
}

func engineInputBehindMisplacing(s *pipelineSpec) bool {
	return s.input == "feed" && (misplacing(s.processors) && (splitting(s.processors) || s.output.namesSingles()) || s.output.misplacesSingles())
}

// engineInputBehindFailFast: the verdict is that of the output which failed first, and
// what it doesn't name counts as delivered at the others too.
func engineInputBehindFailFast(s *pipelineSpec) bool {
	return s.input == "feed" && s.output.any(failsFastWithSingles)
}

func failsFastWithSingles(o *out) bool { return o.failsFast() && o.anyChild((*out).namesSingles) }

func batchingMisplaces(s *pipelineSpec) bool {
	return s.output.any(func(o *out) bool {
		inner := *o
		inner.batching = nil
		return o.batching != nil && misplacing(o.batched) && inner.namesSinglesItself()
	})
}

// batchingExpands: a batcher counts a message as delivered when one of its parts is.
func batchingExpands(s *pipelineSpec) bool {
	return s.output.any(func(o *out) bool {
		inner := *o
		inner.batching = nil
		expands := slices.ContainsFunc(o.batched, func(p processor) bool { return strings.Contains(inYAML(p.conf), "unarchive") })
		return o.batching != nil && expands && inner.namesSinglesItself()
	})
}

func brokerBatchingAboveMisplacing(s *pipelineSpec) bool {
	return s.output.any(func(o *out) bool {
		return o.kind == "broker" && o.batching != nil && !o.retries() && o.anyChild((*out).misplacesSingles)
	})
}

func fallbackAboveMisplacing(s *pipelineSpec) bool {
	return s.output.any(func(o *out) bool { return o.kind == "fallback" && o.anyChild((*out).misplacesSingles) })
}

func failFastUnderAttribution(s *pipelineSpec) bool {
	return s.output.any(func(o *out) bool {
		return (o.kind == "fallback" || o.batching != nil) && o.any(failsFastWithSingles)
	})
}

// failFastUnderOneVerdict: fan_out_fail_fast gives a verdict for each output that fails.
// Who waits for one takes the second one for that of the next batch or output, leaves the
// output waiting for ever to be rid of it, or, an output's processors, writes into a
// BatchError that is being read. An input of the engine's takes two.
func failFastUnderOneVerdict(s *pipelineSpec) bool {
	return s.output.verdicts() > 2 || s.output.any(func(o *out) bool {
		waits := slices.Contains([]string{"retry", "drop_on", "fallback", "reject_errored"}, o.kind) ||
			o.pattern == "fan_out_sequential_fail_fast" || o.batching != nil || o.retries() || len(o.processors) > 0
		return waits && o.any(func(inner *out) bool { return inner.pattern == "fan_out_fail_fast" })
	})
}

// verdicts is how many an output gives at most.
func (o *out) verdicts() int {
	sum, most := 0, 1
	for _, child := range o.children {
		sum, most = sum+child.verdicts(), max(most, child.verdicts())
	}
	if o.pattern == "fan_out_fail_fast" || o.kind == "switch" {
		return sum
	}
	return most
}
