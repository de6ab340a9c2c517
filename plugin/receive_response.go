package plugin

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Synchronous responses of a pipeline: each goes back on the session of its message, and is
// acknowledged there before the message is. The engine puts the responses of a batch into
// one store, in the order of their arrival. Which message each of them is for shows in the
// metadata that the message had: the session, and the number of the message or stream.

// syncResponse is what the pipeline responded to a message, or to the parts of a stream that
// are in one batch: their responses cannot be told apart.
type syncResponse struct {
	source   *source
	messages []*service.Message
	items    []item // to be acknowledged after the response
}

// request identifies a message, or a stream, among the others of its batch.
type request struct {
	session string
	stream  bool
	number  string
}

// request is zero for an event: nobody waits for a response to it.
func (it *item) request() request {
	if it.message != nil {
		return request{it.source.id, false, strconv.FormatUint(uint64(it.message.Number()), 10)}
	}
	if stream := it.of.stream(); stream != nil {
		return request{it.source.id, true, strconv.FormatUint(uint64(stream.Tx()), 10)}
	}
	return request{}
}

// requestOf returns the request of a response, by the response's metadata.
func requestOf(response *service.Message) (r request) {
	r.session, _ = response.MetaGet(metaSessionID)
	if r.number, r.stream = response.MetaGet(metaTxID); !r.stream {
		r.number, _ = response.MetaGet(metaAckID)
	}
	return r
}

// match separates the items of a batch without a response from those whose response must be
// acknowledged first. The error is for a response that may be for any of several messages,
// or for none of these: an output's batching may have merged them with others. A message
// that is alone leaves no doubt, so a redelivery helps.
func (d *delivery) match() (items []item, responses []*syncResponse, err error) {
	messages := slices.Concat(d.responses.Read()...)
	if len(messages) == 0 {
		return d.items, nil, nil
	}
	known := make(map[request]*syncResponse)
	ofItem := make([]*syncResponse, len(d.items)) // nil for events
	for i := range d.items {
		it := &d.items[i]
		key := it.request()
		if key == (request{}) {
			continue
		}
		if known[key] == nil {
			known[key] = &syncResponse{source: it.source}
		} else if known[key].source != it.source { // the client has reconnected, and its numbers began anew
			return nil, nil, errAmbiguous
		}
		ofItem[i] = known[key]
	}
	if len(known) == 0 {
		return d.items, nil, nil
	}
	for _, m := range messages {
		if kind, _ := m.MetaGet(metaMessageType); kind == messageTypeSession {
			continue
		}
		to := requestOf(m)
		resp := known[to]
		if len(d.items) == 1 && (to.session == "" || to.number == "") {
			resp = ofItem[0]
		}
		if resp == nil {
			return nil, nil, errAmbiguous
		}
		resp.messages = append(resp.messages, m)
	}
	for i, resp := range ofItem {
		if resp == nil || len(resp.messages) == 0 {
			items = append(items, d.items[i])
			continue
		}
		if len(resp.items) == 0 {
			responses = append(responses, resp)
		}
		resp.items = append(resp.items, d.items[i])
	}
	return items, responses, nil
}

var errAmbiguous = errors.New("ambiguous synchronous response: keep the metadata " +
	metaSessionID + ", " + metaAckID + " and " + metaTxID + ", and use no batching in an output that responds")

// outMessages returns the response as it is sent: as messages of the kind of the message, and
// each to a part of a stream as a stream of the same name. A response to text that is no
// valid UTF-8 is sent as bytes.
func (resp *syncResponse) outMessages() []*outMessage {
	list := make([]*outMessage, len(resp.messages))
	for i, m := range resp.messages {
		payload, err := contentOf(m)
		if err != nil {
			return []*outMessage{{err: err}} // nothing of the answer is sent
		}
		out := &outMessage{}
		list[i] = out
		out.Payload = payload
		to := &resp.items[0]
		if to.message == nil {
			out.Kind, out.streamName = cryo.KindStream, to.of.stream().Name()
		} else if out.Kind = cryo.KindText; to.message.Kind == cryo.KindBinary || !utf8.Valid(payload) {
			out.Kind = cryo.KindBinary
		}
	}
	return list
}

// responder sends responses.
type responder struct{ sender sender }

func newResponder(ackTimeout time.Duration, res *service.Resources) *responder {
	return &responder{sender{chunkBytes: cryo.DefaultChunkBytes, ackTimeout: ackTimeout, metrics: newAnswerMetrics(meterOf(res))}}
}

// send sends responses, to the sessions side by side and to each in order, and waits for
// their acknowledgements. It calls settle once for each session, as soon as that is
// settled, with its responses and their errors.
func (r *responder) send(ctx context.Context, responses []*syncResponse, settle func(responses []*syncResponse, errs []error)) {
	bySource := make(map[*source][]*syncResponse)
	for _, resp := range responses {
		bySource[resp.source] = append(bySource[resp.source], resp)
	}
	var sending sync.WaitGroup
	for src, list := range bySource {
		sending.Go(func() { settle(list, r.sendTo(ctx, src.session, list)) })
	}
	sending.Wait()
}

// sendTo sends responses to one session, and returns the first error of each.
func (r *responder) sendTo(ctx context.Context, session *cryo.Session, responses []*syncResponse) []error {
	var (
		messages []*outMessage
		ends     = make([]int, len(responses)) // of each response's messages
	)
	for i, resp := range responses {
		messages = append(messages, resp.outMessages()...)
		ends[i] = len(messages)
	}
	r.sender.send(ctx, session, messages)

	failed := make([]error, len(responses))
	begin := 0
	for i, end := range ends {
		if at := slices.IndexFunc(messages[begin:end], func(m *outMessage) bool { return m.err != nil }); at >= 0 {
			failed[i] = messages[begin+at].err
		}
		begin = end
	}
	return failed
}
