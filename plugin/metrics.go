package plugin

import (
	"errors"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The metrics of our components, in addition to those that the engine has for every
// input and output. docs/metrics.md explains them and config/grafana draws them, which a
// test checks. Labels are few, and no value of them comes from a peer. Frequent events are
// counted once per batch.
const (
	metricSessions          = "cryo_sessions"
	metricSessionsDenied    = "cryo_sessions_denied"
	metricReconnections     = "cryo_reconnections"
	metricReceived          = "cryo_messages_received"
	metricBytesReceived     = "cryo_bytes_received"
	metricSent              = "cryo_messages_sent"
	metricBytesSent         = "cryo_bytes_sent"
	metricFiltered          = "cryo_messages_filtered"
	metricRejected          = "cryo_messages_rejected"
	metricSendsRejected     = "cryo_sends_rejected"
	metricSessionRejections = "cryo_session_rejections"
	metricAckLatency        = "cryo_ack_latency_ns"
	metricUnacknowledged    = "cryo_messages_unacknowledged"
	metricLateAcks          = "cryo_late_acks"
	metricStreamsOpen       = "cryo_streams_open"

	labelMessageType = "message_type"
	labelStatus      = "status" // of HTTP
)

// sessionMetrics are those of a component that has sessions.
type sessionMetrics struct {
	sessions   *gauge
	rejections *service.MetricCounter
	lateAcks   *service.MetricCounter
}

func newSessionMetrics(m meter) sessionMetrics {
	return sessionMetrics{
		sessions:   m.newGauge(metricSessions),
		rejections: m.NewCounter(metricSessionRejections, labelMessageType),
		lateAcks:   m.NewCounter(metricLateAcks),
	}
}

// watch lets sessions with these options count.
func (m sessionMetrics) watch(opts *cryo.SessionOptions) {
	opts.OnLateAck = func(*cryo.Session) { m.lateAcks.Incr(1) }
	opts.OnReject = func(_ *cryo.Session, kind cryo.Kind) { m.rejections.Incr(1, messageTypeName(kind)) }
}

// dialMetrics are those of a component that dials.
type dialMetrics struct {
	sessionMetrics
	reconnections *service.MetricCounter
}

func newDialMetrics(m meter) dialMetrics {
	return dialMetrics{newSessionMetrics(m), m.NewCounter(metricReconnections)}
}

// connected counts a session until gone is called.
func (m dialMetrics) connected(again bool) {
	if again {
		m.reconnections.Incr(1)
	}
	m.sessions.add(1)
}

func (m dialMetrics) gone() { m.sessions.add(-1) }

// listenMetrics are those of a listener. A component that uses it reports them.
type listenMetrics struct {
	mu       sync.Mutex
	reporter listenReporter
	sessions int // that are connected
}

// listenReporter has the metrics under the labels of one component.
type listenReporter struct {
	component levelKey
	sessionMetrics
	sessionsDenied *service.MetricCounter
}

func newListenMetrics(m meter) *listenMetrics {
	return &listenMetrics{reporter: newListenReporter(m)}
}

func newListenReporter(m meter) listenReporter {
	return listenReporter{m.component, newSessionMetrics(m), m.NewCounter(metricSessionsDenied, labelStatus)}
}

// reportAs lets another component report the metrics: the one that did may be of a stream that
// is deleted.
func (m *listenMetrics) reportAs(component meter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reporter.component == component.component {
		return
	}
	m.reporter.sessions.close()
	m.reporter = newListenReporter(component)
	m.reporter.sessions.add(m.sessions)
}

// countSession counts a session that is connected, or -1 for one that has ended.
func (m *listenMetrics) countSession(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions += n
	m.reporter.sessions.add(n)
}

// current returns the counters.
func (m *listenMetrics) current() listenReporter {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reporter
}

// watch lets a server with these options count.
func (m *listenMetrics) watch(opts *cryo.ServerOptions) {
	opts.OnLateAck = func(*cryo.Session) { m.current().lateAcks.Incr(1) }
	opts.OnReject = func(_ *cryo.Session, kind cryo.Kind) { m.current().rejections.Incr(1, messageTypeName(kind)) }
	opts.OnDeny = func(status int) { m.current().sessionsDenied.Incr(1, strconv.Itoa(status)) }
}

// receiveMetrics are those of the receiving half.
type receiveMetrics struct {
	received, receivedBytes *service.MetricCounter
	filtered, rejected      *service.MetricCounter
	ackLatency              *service.MetricTimer
	unacknowledged          *gauge
	streamsOpen             *gauge
}

func newReceiveMetrics(m meter) receiveMetrics {
	return receiveMetrics{
		received:       m.NewCounter(metricReceived, labelMessageType),
		receivedBytes:  m.NewCounter(metricBytesReceived, labelMessageType),
		filtered:       m.NewCounter(metricFiltered, labelMessageType),
		rejected:       m.NewCounter(metricRejected, labelMessageType),
		ackLatency:     m.NewTimer(metricAckLatency),
		unacknowledged: m.newGauge(metricUnacknowledged),
		streamsOpen:    m.newGauge(metricStreamsOpen),
	}
}

// took counts received messages.
func (m *receiveMetrics) took(messages []*cryo.Message) {
	var t tally
	for _, message := range messages {
		t.add(message.Kind, len(message.Payload))
	}
	t.count(m.received, m.receivedBytes)
}

// acknowledged times the first message of a batch, from the network to here.
func (m *receiveMetrics) acknowledged(first *cryo.Message) {
	m.ackLatency.Timing(int64(time.Since(first.Time())))
}

// sendMetrics are those of the sending half.
type sendMetrics struct {
	sent, sentBytes *service.MetricCounter
	rejected        *service.MetricCounter
	ackLatency      *service.MetricTimer
	unacknowledged  *gauge
	streamsOpen     *gauge
}

func newSendMetrics(m meter) sendMetrics {
	return sendMetrics{
		sent:           m.NewCounter(metricSent, labelMessageType),
		sentBytes:      m.NewCounter(metricBytesSent, labelMessageType),
		rejected:       m.NewCounter(metricSendsRejected, labelMessageType),
		ackLatency:     m.NewTimer(metricAckLatency),
		unacknowledged: m.newGauge(metricUnacknowledged),
		streamsOpen:    m.newGauge(metricStreamsOpen),
	}
}

// newAnswerMetrics are those of an input that sends synchronous responses: only sent and
// sentBytes are reported. The others would be mistaken for those of what it receives.
func newAnswerMetrics(m meter) sendMetrics {
	answers := newSendMetrics(meter{levels: &levels{byKey: make(map[levelKey]*level)}})
	answers.sent = m.NewCounter(metricSent, labelMessageType)
	answers.sentBytes = m.NewCounter(metricBytesSent, labelMessageType)
	return answers
}

// sending counts messages as unacknowledged; awaited ends that, and times it unless
// they were late or the context was done first.
func (m *sendMetrics) sending(messages int) (began time.Time) {
	m.unacknowledged.add(messages)
	return time.Now()
}

func (m *sendMetrics) awaited(inTime bool, messages int, began time.Time) {
	m.unacknowledged.add(-messages)
	if inTime {
		m.ackLatency.Timing(int64(time.Since(began)))
	}
}

// settled counts messages that one session was sent, by their results. errs is nil if all were
// acknowledged.
func (m *sendMetrics) settled(messages []*outMessage, errs []error) {
	var sent, rejected tally
	for i, message := range messages {
		if errs == nil || errs[i] == nil {
			sent.add(message.Kind, len(message.Payload))
		} else if isRejection(errs[i]) {
			rejected.add(message.Kind, 0)
		}
	}
	sent.count(m.sent, m.sentBytes)
	rejected.count(m.rejected, nil)
}

// isRejection reports whether the peer has rejected a message, which it has received.
func isRejection(err error) bool {
	var rejected *cryo.RejectedError
	return errors.As(err, &rejected) || errors.Is(err, cryo.ErrStreamCancelled)
}

// tally counts the messages of a batch by type, so that each counter is raised once.
type tally [4]struct{ messages, bytes int64 }

var tallied = [...]cryo.Kind{cryo.KindText, cryo.KindBinary, cryo.KindError, cryo.KindStream}

func (t *tally) add(typ cryo.Kind, bytes int) {
	for i := range tallied {
		if tallied[i] == typ {
			t[i].messages++
			t[i].bytes += int64(bytes)
		}
	}
}

// count raises the counters; bytes may be nil.
func (t *tally) count(messages, bytes *service.MetricCounter) {
	for i, typ := range tallied {
		if n := t[i]; n.messages > 0 {
			messages.Incr(n.messages, messageTypeName(typ))
			if bytes != nil {
				bytes.Incr(n.bytes, messageTypeName(typ))
			}
		}
	}
}

// meter makes the metrics of one component.
type meter struct {
	*service.Metrics
	levels    *levels
	component levelKey
}

// levels are the gauges of one process by the labels that the engine gives them.
// Components can have the same labels, as the copies of a broker do: the gauge is the sum of
// theirs. A level is never removed, like the series of the exporter.
type levels struct {
	mu    sync.Mutex
	byKey map[levelKey]*level
}

type levelKey struct{ stream, path, label, name string }

type level struct {
	mu  sync.Mutex
	sum int64
}

type levelsKey struct{}

func meterOf(res *service.Resources) meter {
	all, _ := res.GetOrSetGeneric(levelsKey{}, &levels{byKey: make(map[levelKey]*level)})
	return meter{res.Metrics(), all.(*levels), levelKey{
		stream: res.StreamID(), path: strings.Join(res.Path(), "."), label: res.Label(),
	}}
}

func (l *levels) level(key levelKey) *level {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byKey[key] == nil {
		l.byKey[key] = &level{}
	}
	return l.byKey[key]
}

// gauge is one component's part of a level. The engine's own gauges can only be set.
type gauge struct {
	metric *service.MetricGauge
	level  *level

	// Guarded by the level's mutex.
	part   int64
	closed bool
}

func (m meter) newGauge(name string) *gauge {
	key := m.component
	key.name = name
	g := &gauge{metric: m.NewGauge(name), level: m.levels.level(key)}
	g.add(0)
	return g
}

func (g *gauge) add(n int) {
	g.level.mu.Lock()
	defer g.level.mu.Unlock()
	if !g.closed {
		g.addLocked(int64(n))
	}
}

func (g *gauge) addLocked(n int64) {
	g.part += n
	g.level.sum += n
	g.metric.Set(g.level.sum)
}

// close removes the component's part, for good.
func (g *gauge) close() {
	g.level.mu.Lock()
	defer g.level.mu.Unlock()
	g.addLocked(-g.part)
	g.closed = true
}
