// Package cryo speaks the Cryo protocol, release 1.4, at both ends: acknowledged messages
// and streams over WebSocket.
//
//	session, err := cryo.Dial(ctx, "wss://cryo.example.com/feed", &cryo.DialOptions{Token: token})
//	if err != nil {
//		return err
//	}
//	defer session.Close(ctx, "done")
//	if err := session.SendText(ctx, "hello"); err != nil {
//		return err // not acknowledged; it may have been delivered
//	}
//	for message, err := range session.Messages(ctx) {
//		if err != nil {
//			return err // the session has ended, or ctx is done
//		}
//		deliver(message.Payload)
//		_ = message.Ack() // without it, the peer may send the message again
//	}
//
// # Usage
//
// [Dial] opens a session with a server, and a [Client] another one when that is lost;
// [Server] is an [net/http.Handler] that accepts them. Both ends have a [Session] then, with
// the same methods.
//
// [Session.SendText], [Session.SendBinary] and [Session.SendBatch] return when the peer has
// acknowledged. [Session.Queue] does not wait: its [Pending] does, or is cancelled.
// [Session.Messages], [Session.Receive] and [Session.ReceiveBatch] return what the peer has
// sent. A received message is acknowledged by [Message.Ack], when it has been delivered and
// not before, or rejected by [Message.Reject]; a message that is neither may be sent again
// by the peer, on another connection.
//
// Data that is larger than a message, or has no end yet, travels as a stream.
// [Session.SendStream] sends a reader, [Session.OpenStream] returns a writer; both are
// done when the peer has acknowledged the whole. [Session.Streams] and
// [Session.AcceptStream] return readers, whose [IncomingStream.Ack] acknowledges that the
// whole has been delivered. A truncated stream never reads as a whole one: Read returns
// [io.EOF] only after the sender has finished the stream.
//
// A session is one connection. A [Client] has one after the other, with the same
// id for the server: [Client.Send] returns when the messages are acknowledged on
// one of them, [Client.Await] returns the session to receive from. Numbers of
// messages belong to their connection: a message's Ack goes to the session that
// it came from, or nowhere.
//
// # Cancellation
//
// A context bounds the caller's wait, never the connection; that of a sent
// stream bounds the stream. A session ends by [Session.Close], by the peer's BYE
// or close, by the end of the network connection, by a peer timeout, or because the
// peer broke the protocol. The first cause wins; whoever waits then gets it, see
// [Session.Err].
//
// # Ending
//
// What each way to end stops, what is possible afterwards, and what it releases:
//
//	                stops                            still possible                      returns when                    releases
//	Close           sends, reads of data; streams    Ack until BYE; Receive and Read     the peer has closed, or after   nothing
//	                that come in are cancelled       of what was received, for ever      CloseTimeout
//	CloseNow        everything                       Receive and Read, for ever          the connection is cut           nothing
//	Drain           new messages and streams;        Receive, Ack, Reject, sends         all received is settled, and    what is settled
//	                those not whole are cancelled    until all received is settled       then as Close
//	Discard         Receive of messages in the       everything else; the session        at once                         the messages in the
//	                queue, and of later ones         is not ended                                                        queue, and later ones
//	Server.Shutdown new clients; as Close for all    as Close                            the sessions have ended and     messages that nobody
//	                sessions                                                             their handlers returned         could receive¹
//	Server.Drain    new clients; as Drain for all    as Drain                            as Shutdown                     as Shutdown
//
// ¹ Where OnSession is nil.
//
// When the context is done, Close and Shutdown cut the connections; Drain leaves sessions
// open, for Close. None of them loses what was received: what is not acknowledged, the peer
// may send again on another connection. Received messages count against MaxBufferBytes of a
// server until they are settled or discarded, after the end of their session too. Sends
// that are not acknowledged return the cause of the end.
//
// # Limits
//
// A message is at most [MaxPayload] bytes. What is received and not settled is
// bounded by [SessionOptions.MaxBufferBytes]; beyond it the session stops
// reading, and a dialling end lets the server know that it is alive.
// A session has at most 256 received streams that are announced or open.
// A stream may have any length, or less than 2 GiB where the receiver pulls.
// Unread bytes of received streams count as received and not settled; what was
// read doesn't, so two streams that are both being read never stop each other.
// A sent stream holds four chunks of the default size in memory, or one larger chunk.
// Compression is never negotiated.
package cryo
