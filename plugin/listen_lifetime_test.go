package plugin

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// claiming is a listener whose tokens are claims that nobody has signed.
const claiming = `
cryo_server:
  address: '` + somewhere + `'
  authorize: root = this.token.parse_json()
  session_expires: root = this.authorized.exp
  session_owner: root = this.authorized.sub
`

// claims are a token of a subject that expires after some time.
func claims(subject string, after time.Duration) string {
	return fmt.Sprintf(`{"sub":%q,"exp":%d}`, subject, time.Now().Add(after).Unix())
}

// join connects a client with a token.
func (e *engine) join(token string, id uint64) *cryo.Session {
	e.t.Helper()
	s, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: id})
	require.NoError(e.t, err)
	synctest.Wait() // the component knows of it by then
	return s
}

// wantClosed requires that a client's session ends after some time, with this close code and reason.
func wantClosed(t *testing.T, s *cryo.Session, after time.Duration, code int, reason string) {
	t.Helper()
	time.Sleep(after - time.Nanosecond)
	synctest.Wait()
	require.NoError(t, s.Err())
	time.Sleep(time.Nanosecond)
	synctest.Wait()
	closed := &cryo.PeerClosedError{}
	require.ErrorAs(t, s.Err(), &closed)
	require.Equal(t, reason, closed.Reason)
	if closed.Code != 0 { // 0 if BYE came first
		require.Equal(t, code, closed.Code)
	}
}

func TestSessionEndsWithItsToken(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		token := claims("ann", time.Minute)
		client := e.join(token, 7)
		e.wantReceives(t, client, "it has not expired")
		wantClosed(t, client, time.Minute, 4000, "session expired")
		<-client.Done()
		synctest.Wait()
		e.wantMetrics("expired", map[string]int64{"cryo_sessions": 0, "cryo_sessions_expired": 1, "cryo_messages_unacknowledged": 0})
		e.log.want(t, "INFO Closed an expired session", "session=7", "session expired", "unacknowledged=0")

		require.Equal(t, "The token has expired.", e.wantDenied(cryo.DialOptions{Token: token, SessionID: 7}, 401).Message)
		e.wantReceives(t, e.join(claims("ann", time.Minute), 7), "with a renewed token")
	})
}

func TestMessageInFlightIsAcknowledgedAfterTheExpiry(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		client := e.join(claims("ann", time.Minute), 7)
		inFlight := send(client, "in flight")
		a := e.arrival()
		time.Sleep(time.Minute + 29*time.Second)
		late := send(client, "late")
		e.wantNoArrival("it was sent after the expiry")
		a.deliver()
		inFlight.wantAcked(t, "the session has waited")
		require.ErrorContains(t, late.result(t), `"session expired"`)
		e.wantReceives(t, e.join(claims("ann", time.Minute), 7), "the next session")
	})
}

func TestExpiredSessionOfAStalledPipelineEnds(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(claiming, toProbe)
		client := e.join(claims("ann", time.Minute), 7)
		stalled := send(client, "stalled")
		a := e.arrival()
		wantClosed(t, client, time.Minute+30*time.Second, 4000, "session expired")
		require.Error(t, stalled.result(t), "it must be sent again")
		synctest.Wait()
		e.log.want(t, "Closed an expired session", "unacknowledged=1")
		e.wantMetrics("the pipeline still has the message", map[string]int64{"cryo_sessions": 0, "cryo_sessions_expired": 1, "cryo_messages_unacknowledged": 1})
		a.deliver()
		e.wantMetrics("delivered", map[string]int64{"cryo_messages_unacknowledged": 0})
		p.stop()
	})
}

func TestExpiryIsReportedByTheSessionEvent(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenEvents, "max_session_age: 1m"), toProbe)
		client := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		<-client.Done()
		left := e.wantNext(t, "7 disconnected")
		cause, _ := left.batch[0].MetaGet("cryo_session_cause")
		require.Equal(t, "session ended: session expired: maximum age of 1m0s reached", cause)
		left.deliver()
	})
}

// The published client for browsers connects again after this close code, with the same token.
func TestSessionEndsAtItsMaximumAge(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_session_age: 1h"), toProbe)
		client := e.rawClient()
		client.AnswerPings()
		time.Sleep(54*time.Minute - time.Second)
		e.wantMetrics("not before nine tenths of it", map[string]int64{"cryo_sessions": 1})
		time.Sleep(6*time.Minute + time.Second)
		synctest.Wait()
		client.WantClose("the end, without BYE", 1013, "session expired: maximum age of 1h0m0s reached")
		require.NoError(t, client.WS.Close())
		e.wantReceives(t, e.dialAs(77), "with the same token")
		e.wantMetrics("expired", map[string]int64{"cryo_sessions_expired": 1})
	})
}

func TestClientWithARenewedTokenTakesOverWithinTheGracePeriod(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(strings.TrimSpace(claiming)+"\n  session_expiry_grace: 20s", toProbe)
		old := e.join(claims("ann", time.Minute), 7)
		time.Sleep(time.Minute + 10*time.Second)
		e.wantReceives(t, old, "within the grace period")
		e.wantDenied(cryo.DialOptions{Token: claims("eve", time.Minute), SessionID: 7}, 401)
		require.NoError(t, old.Err())
		renewed := e.join(claims("ann", time.Minute), 7)
		require.ErrorContains(t, old.Err(), "taken over")
		e.wantReceives(t, renewed, "it has taken over")
		e.wantMetrics("taken over", map[string]int64{"cryo_sessions_expired": 0, "cryo_sessions": 1})
		wantClosed(t, renewed, time.Minute+20*time.Second, 4000, "session expired")
	})
}

// The client of an expired session still has a message in the pipeline, so its session is open.
func TestOutputsDoNotSendToAnExpiredSession(t *testing.T) {
	for name, fields := range map[string]string{
		"to all":       "send_to: all",
		"to any":       "send_to: any",
		"to a session": "send_to: session\n  session_id: '7'\nprocessors: [ { mapping: 'meta cryo_session_owner = \"ann\".hash(\"sha256\").encode(\"hex\")' } ]",
		"by a mapping": "send_to: match\n  match: root = true",
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(claiming, toProbe)
				e.run(fromFeed, strings.TrimSpace(claiming)+"\n  "+fields)
				old := e.join(claims("ann", time.Minute), 7)
				e.wantSends(t, old, "it has not expired")
				send(old, "in flight")
				a := e.arrival()
				time.Sleep(time.Minute)
				synctest.Wait()
				b := e.produce("for the next session")
				wantNothing(t, old)
				require.NoError(t, old.Err())
				renewed := e.join(claims("ann", time.Minute), 7)
				require.NoError(t, receiveTexts(t, renewed, "for the next session")[0].Ack())
				b.wantDelivered(t, "no message is lost")
				a.deliver()
			})
		})
	}
}

// A synchronous response is sent on the session of its request for as long as that is open.
func TestRequestInFlightIsAnsweredAfterTheExpiry(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, answering, "sleep: { duration: 89s }", inCapital)
		client := e.join(claims("ann", time.Minute), 7)
		request := send(client, "request")
		time.Sleep(88 * time.Second)
		synctest.Wait()
		require.NoError(t, client.Err(), "the session waits for its messages in flight")
		require.NoError(t, receiveTexts(t, client, "REQUEST")[0].Ack())
		request.wantAcked(t, "the response is acknowledged")
		<-client.Done()
		require.ErrorContains(t, client.Err(), "session expired")
		synctest.Wait()
		e.log.want(t, "Closed an expired session", "unacknowledged=0")
	})
}

func TestRequestThatIsAnsweredAfterTheEndOfItsSessionIsNotAcknowledged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, answering, "sleep: { duration: 91s }", inCapital)
		client := e.join(claims("ann", time.Minute), 7)
		acknowledgeAll(client)
		request := send(client, "request")
		time.Sleep(90 * time.Second)
		require.Error(t, request.result(t), "it must be sent again")
		next := e.join(claims("ann", time.Hour), 7)
		time.Sleep(time.Minute)
		wantNothing(t, next)
		e.wantMetrics("nothing is left of it", map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_sessions": 1})
		again := send(next, "request")
		require.NoError(t, receiveTexts(t, next, "REQUEST")[0].Ack())
		again.wantAcked(t, "sent again")
	})
}

func TestOutputsSendWithinTheGracePeriod(t *testing.T) {
	for _, fields := range []string{"send_to: all", "send_to: any", "send_to: session\n  session_id: '7'", "send_to: match\n  match: root = true"} {
		t.Run(fields, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				expiring := strings.TrimSpace(claiming) + "\n  session_expiry_grace: 20s"
				e.run(expiring, toProbe)
				e.run(fromFeed, expiring+"\n  "+fields, "mapping: 'meta cryo_session_owner = \"ann\".hash(\"sha256\").encode(\"hex\")'")
				client := e.join(claims("ann", time.Minute), 7)
				send(client, "in flight")
				a := e.arrival()
				time.Sleep(time.Minute + 19*time.Second)
				e.wantSends(t, client, "within the grace period")
				a.deliver()
			})
		})
	}
}

// A message that was sent to a session which expires is sent again.
func TestUnacknowledgedMessageIsSentAgainAfterTheExpiry(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromFeed, strings.TrimSpace(claiming)+"\n  send_to: any")
		old := e.join(claims("ann", time.Minute), 7)
		b := e.produce("order")
		receiveTexts(t, old, "order")
		time.Sleep(time.Minute)
		<-old.Done()
		b.wantPending(t, "the client has not acknowledged it")
		renewed := e.join(claims("ann", time.Minute), 7)
		require.NoError(t, receiveTexts(t, renewed, "order")[0].Ack())
		b.wantDelivered(t, "the next session has it")
	})
}

func TestExpiryThatIsNotATimeDeniesTheClient(t *testing.T) {
	const (
		never   = time.Duration(0)
		notTime = "field session_expires: the mapping must return a time: a number of seconds since 1970"
		late    = "field session_expires: the mapping must return a time between the years 1970 and 9999"
	)
	for mapping, c := range map[string]struct {
		after  time.Duration
		denied string // words of the log
	}{
		`root = 946684860`:                                {time.Minute, ""}, // the time is 946684800 at first
		`root = 946684860.25`:                             {time.Minute + 250*time.Millisecond, ""},
		`root = now().ts_unix() + 60`:                     {time.Minute, ""},
		`root = "2000-01-01T00:01:00Z"`:                   {time.Minute, ""},
		`root = "2000-01-01T01:01:00.5+01:00"`:            {time.Minute + 500*time.Millisecond, ""},
		`root = now().ts_add_iso8601("PT60S")`:            {time.Minute, ""},
		`root = this.authorized.exp`:                      {never, ""}, // authorize has returned true
		`root = null`:                                     {never, ""},
		`root = deleted()`:                                {never, ""},
		`let unused = 5`:                                  {never, ""},
		`root = 946684800`:                                {never, "The token has expired."},
		`root = 0`:                                        {never, "The token has expired."},
		`root = "1999-12-31T23:59:59Z"`:                   {never, "The token has expired."},
		`root = this.authorized.exp.not_null()`:           {never, "session_expires failed in line 1"},
		`root = throw(this.token)`:                        {never, "session_expires failed in line 1"},
		`root = true`:                                     {never, notTime},
		`root = {}`:                                       {never, notTime},
		`root = []`:                                       {never, notTime},
		`root = "soon"`:                                   {never, notTime},
		`root = ""`:                                       {never, notTime},
		`root = "946684860"`:                              {never, notTime},
		`root = this.token`:                               {never, notTime},
		`root = "0001-01-01T00:00:00Z"`:                   {never, late},
		`root = -1`:                                       {never, late},
		`root = 946684860000`:                             {never, late},
		`root = "1e300".number()`:                         {never, late},
		`root = "9999-12-31T23:59:59-12:00"`:              {never, late},
		`root = this.query.x.or("x").parse_json().number`: {never, "session_expires failed in line 1"},
	} {
		t.Run(mapping, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "session_expires: "+mapped(mapping)), toProbe)
				if c.denied != "" {
					e.wantDenied(cryo.DialOptions{Token: token}, 401)
					e.log.want(t, "WARN Denied a client", c.denied)
					require.Zero(t, e.log.count(token))
					return
				}
				client := e.dial()
				if c.after > 0 {
					wantClosed(t, client, c.after, 4000, "session expired")
					return
				}
				time.Sleep(time.Hour)
				e.wantReceives(t, client, "it does not expire")
			})
		})
	}
}

func TestOwnerThatIsNotTextDeniesTheClient(t *testing.T) {
	for mapping, c := range map[string]struct {
		owned  bool   // a client with another token takes over
		denied string // words of the log
	}{
		`root = "ann"`:                         {true, ""},
		`root = 5`:                             {true, ""},
		`root = 5.5`:                           {true, ""},
		`root = null`:                          {false, ""},
		`root = ""`:                            {false, ""},
		`root = deleted()`:                     {false, ""},
		`root = this.authorized.sub`:           {true, ""},
		`root = this.token`:                    {false, ""}, // a different owner for each token
		`root = true`:                          {false, "field session_owner: the mapping must return text or a number"},
		`root = {}`:                            {false, "field session_owner: the mapping must return text or a number"},
		`root = now().ts_add_iso8601("PT60S")`: {false, "field session_owner: the mapping must return text or a number"},
		`root = "1e20".number()`:               {false, "field session_owner: the mapping returned a floating-point number of 2^53 or more"},
		`root = throw(this.token)`:             {false, "session_owner failed in line 1"},
		`root = this.missing.uppercase()`:      {false, "session_owner failed in line 1"},
	} {
		t.Run(mapping, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server: { address: '"+somewhere+"', authorize: 'root.sub = this.token.slice(0, 3)', session_owner: "+mapped(mapping)+" }", toProbe)
				if c.denied != "" {
					e.wantDenied(cryo.DialOptions{Token: "ann-secret-1"}, 401)
					e.log.want(t, "WARN Denied a client", c.denied)
					require.Zero(t, e.log.count("secret"))
					return
				}
				old := e.join("ann-secret-1", 7)
				if !c.owned {
					require.Equal(t, "The session already exists.", e.wantDenied(cryo.DialOptions{Token: "ann-secret-2", SessionID: 7}, 401).Message)
					e.wantReceives(t, old, "it goes on")
					return
				}
				e.wantReceives(t, e.join("ann-secret-2", 7), "it has taken over")
				require.Error(t, old.Err())
			})
		})
	}
}

func TestLifetimeMappingsSeeTheRequestAndTheResultOfAuthorize(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(`
cryo_server:
  address: '`+somewhere+`'
  authorize: 'root = { "exp": 946684860, "nested": { "list": [ 5 ] } }'
  session_expires: |
    root = if this.token == "t" && this.session_id == "7" && this.query."x-cryo-sid" == "7" && this.headers.host.not_empty() == this.headers.host &&
      this.remote_address == "192.0.2.1:50000" && this.client_certificate == null && this.authorized.nested.list.index(0) == 5 { this.authorized.exp } else { throw("another input") }
`, toProbe)
		client := e.join("t", 7)
		wantClosed(t, client, time.Minute, 4000, "session expired")
	})
}

func TestStreamInProgressIsCancelledAtTheExpiry(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(strings.TrimSpace(claiming)+"\n  streams: { scanner: { lines: {} } }", toProbe)
		client := e.join(claims("ann", time.Minute), 7)
		st, err := client.OpenStream(context.Background(), &cryo.StreamOptions{Name: "lines"})
		require.NoError(t, err)
		write(t, st, "first\nsec")
		e.want("first")[0].deliver()
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Error(t, st.Finish(), "it must be sent again")
		e.wantNoArrival("a partial record is not delivered")
		e.wantMetrics("cancelled", map[string]int64{"cryo_streams_open": 0})
	})
}

func TestListenerStopsWhileASessionIsExpired(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(strings.ReplaceAll(claiming, "root = this.authorized.exp", "root = 946684860"), toProbe)
		dialer := cryotest.DialPeer(t, &websocket.Dialer{NetDialContext: e.net.Dial}, "ws://"+somewhere+"/", claims("ann", time.Minute), 77)
		dialer.ClientHandshake()
		dialer.AnswerPings()
		dialer.WriteFrames(cryotest.Text(1, "in flight"))
		a := e.arrival()
		time.Sleep(time.Minute)
		synctest.Wait()
		stopped := sendAny(func() error { p.stop(); return nil })
		time.Sleep(time.Second)
		a.deliver()
		dialer.WantFrame("the graceful stop delivers it", cryotest.Acked(1))
		for {
			f, err := dialer.Try("the end")
			if err != nil {
				break
			}
			require.Contains(t, []wire.Type{wire.Bye, wire.PingPong}, f.Type)
		}
		require.NoError(t, dialer.WS.Close())
		stopped.wantAcked(t, "stopped")
		e.wantMetrics("stopped", map[string]int64{"cryo_sessions": 0, "cryo_messages_unacknowledged": 0})
	})
}
