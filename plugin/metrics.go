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

// The metrics of the components, in addition to those of the engine. They are described in
// docs/operations/metrics.md, and config/grafana contains a dashboard; a test checks both. Values of labels
// never come from a peer, so that the number of time series is bounded. Frequent events are
// counted once per batch.
const (
	metricListening         = "cryo_listening"
	metricListenerErrors    = "cryo_listener_errors"
	metricSessions          = "cryo_sessions"
	metricSessionsOpened    = "cryo_sessions_opened"
	metricSessionsTakenOver = "cryo_sessions_taken_over"
	metricSessionsLate      = "cryo_sessions_closed_late"
	metricSessionsDenied    = "cryo_sessions_denied"
	metricSessionsExpired   = "cryo_sessions_expired"
	metricReconnections     = "cryo_reconnections"
	metricReceived          = "cryo_messages_received"
	metricBytesReceived     = "cryo_bytes_received"
	metricSent              = "cryo_messages_sent"
	metricBytesSent         = "cryo_bytes_sent"
	metricFiltered          = "cryo_messages_filtered"
	metricRejected          = "cryo_messages_rejected"
	metricRedelivered       = "cryo_messages_redelivered" //nolint:gosec // no credential, though the name contains "cred"
	metricMissed            = "cryo_messages_missed"
	metricSendsRejected     = "cryo_sends_rejected"
	metricSessionRejections = "cryo_session_rejections"
	metricThrottled         = "cryo_throttled_ns"
	metricAckLatency        = "cryo_ack_latency_ns"
	metricUnacknowledged    = "cryo_messages_unacknowledged"
	metricOldest            = "cryo_oldest_unacknowledged_ns"
	metricSessionsPaused    = "cryo_sessions_paused"
	metricLateAcks          = "cryo_late_acks"
	metricFramesIgnored     = "cryo_frames_ignored"
	metricStreamsOpen       = "cryo_streams_open"

	labelMessageType = "message_type"
	labelStatus      = "status" // the HTTP status code of a denied client
	labelKind        = "kind"   // of listenerErrorKinds
)

// sessionMetrics are the metrics about the sessions of a component.
type sessionMetrics struct {
	sessions      *gauge
	rejections    *service.MetricCounter
	lateAcks      *service.MetricCounter
	framesIgnored *service.MetricCounter
}

func newSessionMetrics(m meter) sessionMetrics {
	return sessionMetrics{
		sessions:      m.newGauge(metricSessions),
		rejections:    m.newCounterByType(metricSessionRejections),
		lateAcks:      m.newCounter(metricLateAcks),
		framesIgnored: m.newCounter(metricFramesIgnored),
	}
}

// watch sets the hooks of a session that update the metrics.
func (m sessionMetrics) watch(opts *cryo.SessionOptions) {
	opts.OnLateAck = func(*cryo.Session) { m.lateAcks.Incr(1) }
	opts.OnReject = func(_ *cryo.Session, kind cryo.Kind) { m.rejections.Incr(1, messageTypeName(kind)) }
	opts.OnIgnore = func(*cryo.Session) { m.framesIgnored.Incr(1) }
}

// dialMetrics are the metrics of a component that connects to a server.
type dialMetrics struct {
	sessionMetrics
	reconnections *service.MetricCounter
}

func newDialMetrics(m meter) dialMetrics {
	return dialMetrics{newSessionMetrics(m), m.newCounter(metricReconnections)}
}

// connected counts a session as connected until disconnected is called. reconnected is true if
// the session is not the first one.
func (m dialMetrics) connected(reconnected bool) {
	if reconnected {
		m.reconnections.Incr(1)
	}
	m.sessions.add(1)
}

func (m dialMetrics) disconnected() { m.sessions.add(-1) }

// listenMetrics are the metrics of a listener. One of the components that share it reports
// them.
type listenMetrics struct {
	mu        sync.Mutex
	reporter  listenReporter
	sessions  int // number of connected sessions
	listening int // 1 if clients are accepted, else 0
}

// listenReporter holds the metrics of a listener, with the labels of the component that reports
// them.
type listenReporter struct {
	component levelKey
	sessionMetrics
	listening         *gauge
	errors            *service.MetricCounter
	sessionsOpened    *service.MetricCounter
	sessionsTakenOver *service.MetricCounter
	sessionsDenied    *service.MetricCounter
	sessionsExpired   *service.MetricCounter
	throttled         *service.MetricCounter
}

func newListenMetrics(m meter) *listenMetrics {
	return &listenMetrics{reporter: newListenReporter(m)}
}

func newListenReporter(m meter) listenReporter {
	errors := m.NewCounter(metricListenerErrors, labelKind)
	for _, kind := range listenerErrorKinds {
		errors.Incr(0, kind)
	}
	return listenReporter{
		component:         m.component,
		sessionMetrics:    newSessionMetrics(m),
		listening:         m.newGauge(metricListening),
		errors:            errors,
		sessionsOpened:    m.newCounter(metricSessionsOpened),
		sessionsTakenOver: m.newCounter(metricSessionsTakenOver),
		sessionsDenied:    m.NewCounter(metricSessionsDenied, labelStatus),
		sessionsExpired:   m.newCounter(metricSessionsExpired),
		throttled:         m.newCounter(metricThrottled),
	}
}

// reportAs makes a component report the metrics. It is called after another component, which
// may have reported them before, has left the listener.
func (m *listenMetrics) reportAs(component meter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reporter.component == component.component {
		return
	}
	m.reporter.close()
	m.reporter = newListenReporter(component)
	m.reporter.sessions.add(m.sessions)
	m.reporter.listening.set(m.listening)
}

// close sets the gauges of a listener that has failed to start to 0.
func (m *listenMetrics) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reporter.close()
}

func (r *listenReporter) close() {
	r.sessions.close()
	r.listening.close()
}

// listens sets whether the listener accepts clients.
func (m *listenMetrics) listens(accepting bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := 0
	if accepting {
		now = 1
	}
	m.listening = now
	m.reporter.listening.set(now)
}

// failed counts an error of the listener; kind is one of listenerErrorKinds.
func (m *listenMetrics) failed(kind string) { m.current().errors.Incr(1, kind) }

// connected counts a session as connected until disconnected is called.
func (m *listenMetrics) connected() {
	m.countSession(1)
	m.current().sessionsOpened.Incr(1)
}

// disconnected counts the end of a session. cause is the error of the session.
func (m *listenMetrics) disconnected(cause error) {
	m.countSession(-1)
	switch {
	case errors.Is(cause, cryo.ErrTakenOver):
		m.current().sessionsTakenOver.Incr(1)
	case errors.Is(cause, cryo.ErrExpired):
		m.current().sessionsExpired.Incr(1)
	}
}

// countSession adds n, which is 1 or -1, to the number of connected sessions.
func (m *listenMetrics) countSession(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions += n
	m.reporter.sessions.add(n)
}

// current returns the reporter that is in use.
func (m *listenMetrics) current() listenReporter {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reporter
}

// watch sets the hooks of a server that update the metrics.
func (m *listenMetrics) watch(opts *cryo.ServerOptions) {
	opts.OnLateAck = func(*cryo.Session) { m.current().lateAcks.Incr(1) }
	opts.OnReject = func(_ *cryo.Session, kind cryo.Kind) { m.current().rejections.Incr(1, messageTypeName(kind)) }
	opts.OnIgnore = func(*cryo.Session) { m.current().framesIgnored.Incr(1) }
	opts.OnThrottle = func(_ *cryo.Session, paused time.Duration) { m.current().throttled.Incr(int64(paused)) }
	opts.OnDeny = m.denied
}

// denied counts a client that is denied with an HTTP status.
func (m *listenMetrics) denied(status int) { m.current().sessionsDenied.Incr(1, strconv.Itoa(status)) }

// receiveMetrics are the metrics of the receiving half.
type receiveMetrics struct {
	received, receivedBytes *service.MetricCounter
	filtered, rejected      *service.MetricCounter
	redelivered             *service.MetricCounter
	ackLatency              *service.MetricTimer
	unacknowledged          *gauge
	oldest                  *maxGauge
	paused                  *gauge
	streamsOpen             *gauge
}

func newReceiveMetrics(m meter) receiveMetrics {
	return receiveMetrics{
		received:       m.NewCounter(metricReceived, labelMessageType),
		receivedBytes:  m.NewCounter(metricBytesReceived, labelMessageType),
		filtered:       m.NewCounter(metricFiltered, labelMessageType),
		rejected:       m.newCounterByType(metricRejected),
		redelivered:    m.newCounter(metricRedelivered),
		ackLatency:     m.NewTimer(metricAckLatency),
		unacknowledged: m.newGauge(metricUnacknowledged),
		oldest:         m.newMaxGauge(metricOldest),
		paused:         m.newGauge(metricSessionsPaused),
		streamsOpen:    m.newGauge(metricStreamsOpen),
	}
}

// countReceived counts received messages.
func (m *receiveMetrics) countReceived(messages []*cryo.Message) {
	var t tally
	for _, message := range messages {
		t.add(message.Kind, len(message.Payload))
	}
	t.count(m.received, m.receivedBytes)
}

// observeLatency records the latency of a batch: the time from the receipt of its first message
// until now, when it is acknowledged.
func (m *receiveMetrics) observeLatency(first *cryo.Message) {
	m.ackLatency.Timing(int64(time.Since(first.Time())))
}

// sendMetrics are the metrics of the sending half.
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
		rejected:       m.newCounterByType(metricSendsRejected),
		ackLatency:     m.NewTimer(metricAckLatency),
		unacknowledged: m.newGauge(metricUnacknowledged),
		streamsOpen:    m.newGauge(metricStreamsOpen),
	}
}

// newResponseMetrics returns the metrics of an input's synchronous responses. Only sent and
// sentBytes are reported, because the other metrics of an input are about received messages.
func newResponseMetrics(m meter) sendMetrics {
	responses := newSendMetrics(meter{levels: &levels{byKey: make(map[levelKey]*level)}})
	responses.sent = m.NewCounter(metricSent, labelMessageType)
	responses.sentBytes = m.NewCounter(metricBytesSent, labelMessageType)
	return responses
}

// inFlightAdd counts messages as unacknowledged until inFlightDone is called. It returns the
// current time, to be passed to inFlightDone.
func (m *sendMetrics) inFlightAdd(messages int) (began time.Time) {
	m.unacknowledged.add(messages)
	return time.Now()
}

// inFlightDone ends the count that inFlightAdd began. If inTime is true, no acknowledgement was
// late, and the latency is recorded. began is the time that inFlightAdd returned.
func (m *sendMetrics) inFlightDone(inTime bool, messages int, began time.Time) {
	m.unacknowledged.add(-messages)
	if inTime {
		m.ackLatency.Timing(int64(time.Since(began)))
	}
}

// countResults counts the messages that were sent to one session as sent or rejected. errs
// contains their errors; it is nil if all messages were acknowledged.
func (m *sendMetrics) countResults(messages []*outMessage, errs []error) {
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

// isRejection reports whether the peer has rejected a message or cancelled a stream.
func isRejection(err error) bool {
	var rejected *cryo.RejectedError
	return errors.As(err, &rejected) || errors.Is(err, cryo.ErrStreamCancelled)
}

// tally counts the messages of a batch by type, so that each counter is updated once.
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

// count adds the tally to the counters. bytes may be nil.
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

// meter creates the metrics of one component.
type meter struct {
	*service.Metrics
	levels    *levels
	component levelKey
}

// newCounter returns a counter that is exported as 0 from the start. Prometheus does not count the
// first event of a series that begins with it.
func (m meter) newCounter(name string) *service.MetricCounter {
	counter := m.NewCounter(name)
	counter.Incr(0)
	return counter
}

// newCounterByType is newCounter with the label message_type.
func (m meter) newCounterByType(name string) *service.MetricCounter {
	counter := m.NewCounter(name, labelMessageType)
	for _, typ := range tallied {
		counter.Incr(0, messageTypeName(typ))
	}
	return counter
}

// levels are the values of all gauges of a process, by their labels. Components with the same
// labels, such as the copies within a broker, share a level, so that the gauge shows the sum of
// their values. Like the time series of the exporter, a level is never removed.
type levels struct {
	mu    sync.Mutex
	byKey map[levelKey]*level
}

type levelKey struct{ stream, path, label, name string }

type level struct {
	mu    sync.Mutex
	sum   int64               // of a gauge
	parts map[*maxGauge]int64 // of a maxGauge
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
		l.byKey[key] = &level{parts: make(map[*maxGauge]int64)}
	}
	return l.byKey[key]
}

// gauge is one component's part of a gauge. It supports add, whereas the engine's gauges can
// only be set.
type gauge struct {
	metric *service.MetricGauge
	level  *level

	// Guarded by the level's mutex.
	part   int64 // the component's part of the level's sum
	closed bool
}

func (m meter) newGauge(name string) *gauge {
	key := m.component
	key.name = name
	g := &gauge{metric: m.NewGauge(name), level: m.levels.level(key)}
	g.add(0)
	return g
}

// set replaces the component's part by n.
func (g *gauge) set(n int) {
	g.level.mu.Lock()
	defer g.level.mu.Unlock()
	if !g.closed {
		g.addLocked(int64(n) - g.part)
	}
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

// close removes the component's part from the sum. Later calls of add have no effect.
func (g *gauge) close() {
	g.level.mu.Lock()
	defer g.level.mu.Unlock()
	g.addLocked(-g.part)
	g.closed = true
}

// maxGauge is one component's part of a gauge that shows the maximum of the parts. They are not
// negative, and a part that is 0 is not stored: the engine does not close all components that it makes.
type maxGauge struct {
	metric *service.MetricGauge
	level  *level
}

func (m meter) newMaxGauge(name string) *maxGauge {
	key := m.component
	key.name = name
	g := &maxGauge{metric: m.NewGauge(name), level: m.levels.level(key)}
	g.set(0)
	return g
}

func (g *maxGauge) set(n int64) {
	g.level.mu.Lock()
	defer g.level.mu.Unlock()
	if g.level.parts[g] = n; n == 0 {
		delete(g.level.parts, g)
	}
	maximum := int64(0)
	for _, part := range g.level.parts {
		maximum = max(maximum, part)
	}
	g.metric.Set(maximum)
}

// close removes the component's part. Do not call set afterwards.
func (g *maxGauge) close() { g.set(0) }
