package plugin

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// toClaimed is an output of the listener of claiming, to the session of a message.
func toClaimed(fields string) string {
	return strings.TrimSpace(claiming) + "\n  send_to: session\n  session_id: ${! @cryo_session_id }\n  " + fields
}

// reply is a message for the session of another one, with its metadata except some.
func reply(to *arrival, without ...string) service.MessageBatch {
	m := to.batch[0].Copy()
	m.SetBytes([]byte("reply"))
	for _, key := range without {
		m.MetaDelete(key)
	}
	return service.MessageBatch{m}
}

// requestOfAnn connects ann as session 7, receives a message of hers, and ends the session.
func (e *engine) requestOfAnn(t *testing.T) *arrival {
	t.Helper()
	ann := e.join(claims("ann", time.Hour), 7)
	request := send(ann, "request")
	a := e.arrival()
	a.deliver()
	request.wantAcked(t, "it is delivered")
	end(ann)
	synctest.Wait()
	return a
}

func wantReply(t *testing.T, s *cryo.Session, f *produced) {
	t.Helper()
	require.NoError(t, receiveTexts(t, s, "reply")[0].Ack())
	f.wantDelivered(t, "the session has acknowledged it")
}

func TestMessageForAnEndedSessionIsNotSentToAnotherOwner(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		e.run(fromOnce, toClaimed("no_session: reject"))
		request := e.requestOfAnn(t)
		eve := e.join(claims("eve", time.Hour), 7)
		e.produceBatch(reply(request)).wantFailed(t, "session 7 has a different owner than the message (metadata cryo_session_owner)")
		e.log.want(t, "WARN Message not sent to a session: its owner differs from that of the message", "session=7", "field=session_owner")
		wantNothing(t, eve)
		own := send(eve, "request of eve")
		a := e.arrival()
		a.deliver()
		own.wantAcked(t, "it is delivered")
		wantReply(t, eve, e.produceBatch(reply(a)))
		end(eve)
		synctest.Wait()
		e.produceBatch(reply(request)).wantFailed(t, "session 7 is not connected")
		wantReply(t, e.join(claims("ann", time.Minute), 7), e.produceBatch(reply(request)))
	})
}

func TestMessagesOfABatchReachOnlySessionsOfTheirOwners(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		e.run(fromOnce, toClaimed("no_session: drop"))
		request := e.requestOfAnn(t)
		eve := e.join(claims("eve", time.Hour), 7)
		send(eve, "request of eve")
		a := e.arrival()
		a.deliver()
		batch := append(reply(request), reply(a)...)
		batch[0].SetBytes([]byte("for ann"))
		f := e.produceBatch(append(batch, reply(a, metaSessionOwner)...))
		wantReply(t, eve, f)
		wantNothing(t, eve)
	})
}

func TestMessageWaitsForTheSessionOfItsOwner(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		e.run(fromOnce, toClaimed("no_session: wait"))
		request := e.requestOfAnn(t)
		eve := e.join(claims("eve", time.Hour), 7)
		f := e.produceBatch(reply(request))
		f.wantPending(t, "another owner has its id")
		wantNothing(t, eve)
		end(eve)
		synctest.Wait()
		f.wantPending(t, "nobody has its id")
		wantReply(t, e.join(claims("ann", time.Hour), 7), f)
	})
}

func TestMessageWithoutAnOwnerIsSentOnlyToSessionsWithoutOne(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		e.run(fromOnce, toClaimed("no_session: reject"))
		request := e.requestOfAnn(t)
		ann := e.join(claims("ann", time.Hour), 7)
		lost := reply(request, metaSessionOwner)
		e.produceBatch(lost).wantFailed(t, "session 7 has an owner, and the message has no metadata cryo_session_owner")
		wantNothing(t, ann)
		end(ann)
		synctest.Wait()

		guest := e.join(claims("", time.Hour), 7) // empty text is no owner
		e.produceBatch(reply(request)).wantFailed(t, "session 7 has a different owner than the message (metadata cryo_session_owner)")
		wantReply(t, guest, e.produceBatch(lost))
	})
}

func TestPipelineSendsToTheSessionOfAnOwnerThatItNames(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		e.run(fromOnce, toClaimed("no_session: reject"), `mapping: 'meta cryo_session_owner = "ann".hash("sha256").encode("hex")'`)
		request := e.requestOfAnn(t)
		ann := e.join(claims("ann", time.Hour), 7)
		wantReply(t, ann, e.produceBatch(reply(request, metaSessionOwner)))
	})
}

func TestOwnerInMetadataIsHashed(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		sum := sha256.Sum256([]byte("ann"))
		require.Equal(t, hex.EncodeToString(sum[:]), metadataOf(t, e.requestOfAnn(t).batch[0])["cryo_session_owner"])
		send(e.join(claims("", time.Hour), 7), "of nobody")
		a := e.arrival()
		a.deliver()
		require.NotContains(t, metadataOf(t, a.batch[0]), "cryo_session_owner")
	})
}

func TestMatchComparesOwners(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming, toProbe)
		e.run(fromOnce, strings.TrimSpace(claiming)+"\n  send_to: match\n  match: root = @cryo_session.cryo_session_owner == @cryo_session_owner")
		request := e.requestOfAnn(t)
		eve, ann := e.join(claims("eve", time.Hour), 7), e.join(claims("ann", time.Hour), 8)
		wantReply(t, ann, e.produceBatch(reply(request)))
		wantNothing(t, eve)
	})
}

// The owner of a message from another listener means nothing to a listener without owners.
func TestOwnersAreNotComparedWithoutTheField(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "send_to: session, session_id: '${! @cryo_session_id }'"))
		client := e.dialAs(7)
		m := service.NewMessage([]byte("reply"))
		m.MetaSetMut(metaSessionID, "7")
		m.MetaSetMut(metaSessionOwner, "of another listener")
		wantReply(t, client, e.produceBatch(service.MessageBatch{m}))
	})
}

// A pipeline may send what clients of a listener with owners have sent to a session of one without.
func TestMessagesOfSeveralOwnersReachASessionWithoutOneInOrder(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "send_to: session, session_id: '7'"))
		client := e.dialAs(7)
		batch := batchOf("1", "2", "3", "4")
		for i, owner := range []string{"ann", "bob", "ann", ""} {
			if owner != "" {
				batch[i].MetaSetMut(metaSessionOwner, owner)
			}
		}
		f := e.produceBatch(batch)
		for _, m := range receiveTexts(t, client, "1", "2", "3", "4") {
			require.NoError(t, m.Ack())
		}
		f.wantDelivered(t, "acknowledged")
	})
}
