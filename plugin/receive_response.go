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

// Synchronous responses of a pipeline. A response is sent on the session of its message, which
// is acknowledged only after the response. The engine collects the responses to a batch in one
// store, in any order. The metadata of a response identifies its message: by the session id,
// and the number of the message or stream.

// syncResponse holds the responses to one message, or those to all parts of a stream in a
// batch, which cannot be distinguished.
type syncResponse struct {
	source   *source
	messages []*service.Message
	items    []item // items to acknowledge after the responses
}

// request identifies a message or a stream to which the pipeline may respond.
type request struct {
	session string
	stream  bool
	number  string // cryo_ack_id of a message, or cryo_tx_id of a stream
}

// request returns the request that an item is or belongs to, or the zero value for an event,
// which has no responses.
func (it *item) request() request {
	if it.message != nil {
		return request{it.source.id, false, strconv.FormatUint(uint64(it.message.Number()), 10)}
	}
	if stream := it.owner.stream(); stream != nil {
		return request{it.source.id, true, strconv.FormatUint(uint64(stream.Tx()), 10)}
	}
	return request{}
}

// requestOf returns the request that the metadata of a response identifies.
func requestOf(response *service.Message) (r request) {
	r.session, _ = response.MetaGet(metaSessionID)
	if r.number, r.stream = response.MetaGet(metaTxID); !r.stream {
		r.number, _ = response.MetaGet(metaAckID)
	}
	return r
}

// match assigns the pipeline's responses to the items of a batch. It returns the items without
// a response, and the responses. It returns an error if the message of a response cannot be
// identified, for example because an output's batching has merged several messages.
// Redelivering each message alone resolves that.
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
		} else if known[key].source != it.source { // after a reconnect, the client's numbers start over
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

// outMessages returns the Cryo messages of the response. Each has the type of the item that it
// responds to; a response to a part of a stream is a stream of the same name. A response to
// text that is not valid UTF-8 is sent as bytes.
func (resp *syncResponse) outMessages() []*outMessage {
	list := make([]*outMessage, len(resp.messages))
	for i, m := range resp.messages {
		payload, err := contentOf(m)
		if err != nil {
			return []*outMessage{{err: err}} // because of the error, no part of the response is sent
		}
		out := &outMessage{}
		list[i] = out
		out.Payload = payload
		to := &resp.items[0]
		if to.message == nil {
			out.Kind, out.streamName = cryo.KindStream, to.owner.stream().Name()
		} else if out.Kind = cryo.KindText; to.message.Kind == cryo.KindBinary || !utf8.Valid(payload) {
			out.Kind = cryo.KindBinary
		}
	}
	return list
}

// responder sends the pipeline's synchronous responses to the peers.
type responder struct{ sender sender }

func newResponder(ackTimeout time.Duration, res *service.Resources) *responder {
	return &responder{sender{chunkBytes: cryo.DefaultChunkBytes, ackTimeout: ackTimeout, metrics: newResponseMetrics(meterOf(res))}}
}

// send sends responses and waits for their acknowledgements. Different sessions receive their
// responses concurrently, and each receives its own in order. It calls done for each session
// with its responses and their errors, as soon as these are known.
func (r *responder) send(ctx context.Context, responses []*syncResponse, done func(responses []*syncResponse, errs []error)) {
	bySource := make(map[*source][]*syncResponse)
	for _, resp := range responses {
		bySource[resp.source] = append(bySource[resp.source], resp)
	}
	var sending sync.WaitGroup
	for src, list := range bySource {
		sending.Go(func() { done(list, r.sendTo(ctx, src.session, list)) })
	}
	sending.Wait()
}

// sendTo sends responses to one session, and returns the first error of each, or nil.
func (r *responder) sendTo(ctx context.Context, session *cryo.Session, responses []*syncResponse) []error {
	var (
		messages []*outMessage
		ends     = make([]int, len(responses)) // by response: the index in messages at which it ends
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
