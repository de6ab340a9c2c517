package plugin

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	fieldSendTo    = "send_to"
	fieldSessionID = "session_id"
	fieldNoSession = "no_session"

	sendToAll     = "all"
	sendToSession = "session"

	noSessionWait   = "wait"
	noSessionDrop   = "drop"
	noSessionReject = "reject"
)

func init() {
	service.MustRegisterBatchOutput("cryo_server", serverOutputSpec(), func(conf *service.ParsedConfig, res *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
		return newServerOutput(conf, res)
	})
}

func serverOutputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Listens for Cryo clients and sends them messages.").
		Description(aboutCryo+`This output is a Cryo server: clients, such as those made with the npm package `+"`cryo-client-node`"+` or pages in a browser, connect straight to the pipeline and are sent its messages.

To receive from the same clients, give a `+"`cryo_server`"+` input the same address and the same settings. Without such an input, what clients send is refused.

== Delivery

To one session, a message counts as delivered when the client has acknowledged it.

To all, it counts as delivered when every session that was connected has answered or gone. A session that has not acknowledged within `+"`ack_timeout`"+` is closed, instead of everything being sent to everybody again; so for those who leave or refuse it is at most once. When nobody has acknowledged a message, it is rejected.
`+sendMetadata+sendPerformance).
		Fields(listenFields()...).
		Fields(
			service.NewStringAnnotatedEnumField(fieldSendTo, map[string]string{
				sendToAll:     "To every session that is connected.",
				sendToSession: "To the session that `session_id` names.",
			}).
				Description("Which clients get a message.").
				Default(sendToAll),
			service.NewInterpolatedStringField(fieldSessionID).
				Description("The id of the session that gets the message, with `send_to: session`. Messages that came from Cryo carry their sender's in the metadata `cryo_session_id`.").
				Default("").
				Example("${! @cryo_session_id }"),
			service.NewStringAnnotatedEnumField(fieldNoSession, map[string]string{
				noSessionWait:   "Wait for it up to `ack_timeout`, then reject the message.",
				noSessionDrop:   "Count the message as delivered.",
				noSessionReject: "Reject the message at once.",
			}).
				Description("What to do with a message for which nobody is connected, or not the session that it names.").
				Default(noSessionWait),
		).
		Fields(sendFields()...).
		LintRule(`root = `+listenLint+` else if this.send_to.or("all") == "session" && this.session_id.or("") == "" {
  "send_to: session needs the field session_id"
} else if this.send_to.or("all") == "all" && this.session_id.or("") != "" {
  "the field session_id has no effect without send_to: session"
}`).
		Example("Back to the sender", "Each message goes back to the client that sent it, in capitals.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ "${CRYO_TOKEN}" ]
pipeline:
  processors:
    - mapping: root = content().uppercase()
output:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ "${CRYO_TOKEN}" ]
    send_to: session
    session_id: ${! @cryo_session_id }
`)
}

type serverOutput struct {
	*serverComponent
	sender
	sendTo    string
	sessionID *service.InterpolatedString
	noSession string
}

var _ service.BatchOutput = (*serverOutput)(nil)

func newServerOutput(conf *service.ParsedConfig, res *service.Resources) (*serverOutput, service.BatchPolicy, int, error) {
	c, err := serverComponentFromParsed(conf, res, "the output")
	if err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	o := &serverOutput{serverComponent: c}
	if err := o.targetFromParsed(conf); err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	var (
		policy      service.BatchPolicy
		maxInFlight int
	)
	o.sender, policy, maxInFlight, err = senderFromParsed(conf)
	return o, policy, maxInFlight, err
}

func (o *serverOutput) targetFromParsed(conf *service.ParsedConfig) (err error) {
	if o.sendTo, err = conf.FieldString(fieldSendTo); err != nil {
		return err
	}
	if o.sessionID, err = conf.FieldInterpolatedString(fieldSessionID); err != nil {
		return err
	}
	if o.noSession, err = conf.FieldString(fieldNoSession); err != nil {
		return err
	}
	fixed, static := o.sessionID.Static()
	named := !static || fixed != ""
	switch {
	case o.sendTo != sendToAll && o.sendTo != sendToSession:
		return fmt.Errorf("field %s: %q is neither %s nor %s", fieldSendTo, o.sendTo, sendToAll, sendToSession)
	case o.sendTo == sendToSession && !named:
		return fmt.Errorf("%s: %s needs the field %s", fieldSendTo, sendToSession, fieldSessionID)
	case o.sendTo == sendToAll && named:
		return fmt.Errorf("the field %s has no effect without %s: %s", fieldSessionID, fieldSendTo, sendToSession)
	case o.noSession != noSessionWait && o.noSession != noSessionDrop && o.noSession != noSessionReject:
		return fmt.Errorf("field %s: %q is neither %s, %s nor %s", fieldNoSession, o.noSession, noSessionWait, noSessionDrop, noSessionReject)
	}
	return nil
}

// Connect starts the listener, or joins that of another component.
func (o *serverOutput) Connect(ctx context.Context) error {
	_, err := o.open(ctx)
	return err
}

// WriteBatch returns when each message is acknowledged, dropped or has failed.
func (o *serverOutput) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	if o.listener == nil {
		return service.ErrNotConnected
	}
	messages, errs := o.prepare(batch)
	if o.sendTo == sendToAll {
		o.broadcast(ctx, messages, errs)
	} else {
		o.sendToEach(ctx, batch, messages, errs)
	}
	return batchError(batch, errs)
}

// Close closes the listener, if nobody else uses it.
func (o *serverOutput) Close(ctx context.Context) error { return o.leave(ctx, nil) }

var (
	errNobody    = errors.New("no client is connected")
	errNoSession = errors.New("that session is not connected")
)

// sessions gives those that look finds. When there is none, it waits for as
// long as no_session has it.
func (o *serverOutput) sessions(ctx context.Context, look func() []*cryo.Session) []*cryo.Session {
	ctx, cancel := context.WithTimeout(ctx, o.ackTimeout)
	defer cancel()
	for {
		arrival := o.listener.arrival()
		if found := look(); len(found) > 0 || o.noSession != noSessionWait {
			return found
		}
		select {
		case <-arrival:
		case <-ctx.Done():
			return nil
		}
	}
}

// broadcast sends to all sessions side by side, and waits for all of them.
func (o *serverOutput) broadcast(ctx context.Context, messages []parcel, errs []error) {
	sessions := o.sessions(ctx, o.listener.sessions)
	if len(sessions) == 0 {
		o.fail(errs, errNobody)
		return
	}
	answers := make([][]error, len(sessions))
	var wg sync.WaitGroup
	for i, session := range sessions {
		wg.Go(func() {
			answers[i] = make([]error, len(messages))
			o.send(ctx, session, messages, answers[i])
			o.cutIfLate(ctx, session, answers[i])
		})
	}
	wg.Wait()
	for m := range messages {
		if errs[m] == nil {
			errs[m] = ifNobody(answers, m)
		}
	}
}

// ifNobody gives an error when no session has acknowledged the message.
func ifNobody(answers [][]error, m int) error {
	for _, errs := range answers {
		if errs[m] == nil {
			return nil
		}
	}
	return fmt.Errorf("acknowledged by none of %d sessions, the first says: %w", len(answers), answers[0][m])
}

// cutIfLate closes a session that let the time for its acknowledgement pass. One
// that max_buffer_bytes keeps us from reading may have acknowledged: it stays.
func (o *serverOutput) cutIfLate(ctx context.Context, session *cryo.Session, errs []error) {
	for _, err := range errs {
		if errors.Is(err, errLate) && !session.Paused() && ctx.Err() == nil && session.Err() == nil {
			o.log.Warnf("Closing session %d: %v", session.ID(), err)
			cut, cancel := context.WithTimeout(ctx, 0)
			defer cancel()
			_ = session.Close(cut, "no acknowledgement in time") // it doesn't read: no time for a goodbye
			return
		}
	}
}

// sendToEach sends the messages to the sessions that they name, side by side,
// and in order to each.
func (o *serverOutput) sendToEach(ctx context.Context, batch service.MessageBatch, messages []parcel, errs []error) {
	groups := make(map[uint64][]int)
	ids := batch.InterpolationExecutor(o.sessionID)
	for i := range batch {
		if errs[i] != nil {
			continue
		}
		text, err := ids.TryString(i)
		if err != nil {
			errs[i] = fmt.Errorf("field %s: %w", fieldSessionID, err)
			continue
		}
		id, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			errs[i] = fmt.Errorf("field %s: %q is not the id of a session", fieldSessionID, text)
			continue
		}
		groups[id] = append(groups[id], i)
	}
	var wg sync.WaitGroup
	for id, indexes := range groups {
		wg.Go(func() { o.sendToOne(ctx, id, indexes, messages, errs) })
	}
	wg.Wait()
}

func (o *serverOutput) sendToOne(ctx context.Context, id uint64, indexes []int, messages []parcel, errs []error) {
	part := make([]parcel, len(indexes))
	partErrs := make([]error, len(indexes))
	for i, at := range indexes {
		part[i] = messages[at]
	}
	found := o.sessions(ctx, func() []*cryo.Session { return o.listener.session(id) })
	if len(found) > 0 {
		o.send(ctx, found[0], part, partErrs)
	} else {
		o.fail(partErrs, fmt.Errorf("session %d: %w", id, errNoSession))
	}
	for i, at := range indexes {
		errs[at] = partErrs[i] // nobody else writes there
	}
}

// fail gives all messages that have none yet an error, unless they are dropped.
func (o *serverOutput) fail(errs []error, err error) {
	if o.noSession == noSessionDrop {
		return
	}
	for i := range errs {
		if errs[i] == nil {
			errs[i] = err
		}
	}
}
