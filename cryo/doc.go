// Package cryo implements both ends of the Cryo protocol, release 1.4: acknowledged messages
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
// [Dial] opens a session with a server, and a [Client] reconnects when a session is lost;
// [Server] is an [net/http.Handler] that accepts sessions. Both ends use a [Session], with
// the same methods.
//
// [Session.SendText], [Session.SendBinary] and [Session.SendBatch] return when the peer has
// acknowledged. [Session.Queue] does not wait: the caller waits for its [Pending], or cancels
// it. [Session.Messages], [Session.Receive] and [Session.ReceiveBatch] return received
// messages. [Message.Ack] acknowledges a message, and must be called only once the message is
// delivered; [Message.Reject] rejects it. A message is settled when it is acknowledged or
// rejected. The peer may send an unsettled message again, on another connection.
//
// Data that is larger than a message, or of unknown length, is sent as a stream.
// [Session.SendStream] sends a reader, [Session.OpenStream] returns a writer; both are
// done when the peer has acknowledged the whole stream. [Session.Streams] and
// [Session.AcceptStream] return readers, whose [IncomingStream.Ack] acknowledges that the
// whole stream has been delivered, and whose Close rejects it: either settles the stream. Read
// returns [io.EOF] only after the sender has finished the stream, so that a truncated stream is
// never mistaken for a complete one.
//
// A session is one connection. A [Client] opens one session after the other, with the same
// session id: [Client.Send] returns when the messages are acknowledged, on any of them;
// [Client.Await] returns the session to receive from. Message numbers belong to their
// connection: Ack acknowledges a message on the session that it was received on, or not at
// all.
//
// # Cancellation
//
// A context bounds the caller's wait, never the connection; the context of a sent
// stream bounds the stream. A session ends by [Session.Close], by the peer's BYE
// or close, by the loss of the network connection, by a peer timeout, or by a protocol
// violation of the peer. The first cause wins, and waiting calls return it; see
// [Session.Err].
//
// # Ending
//
// Each way to end stops and releases different things:
//
//	                stops                            still possible                      returns when                    releases
//	Close           sends and reads of data;         Ack until BYE; Receive and Read     the peer has closed, or after   nothing
//	                cancels incomplete streams       of received data, at any time       CloseTimeout
//	CloseNow        everything                       Receive and Read of received        the connection is closed        nothing
//	                                                 data, at any time
//	Drain           new messages and streams;        Receive, Ack, Reject, sends         everything received is          settled messages
//	                cancels incomplete streams       until everything is settled         settled, and then as Close
//	Discard         Receive of messages in the       everything else; the session        immediately                     messages in the queue,
//	                queue, and of later ones         does not end                                                        and later ones
//	Server.Shutdown new clients; as Close for all    as Close                            the sessions have ended and     all messages if
//	                sessions                                                             their handlers returned         OnSession is nil
//	Server.Drain    new clients; as Drain for all    as Drain                            as Shutdown                     as Shutdown
//
// [Server.DrainOver] drains one session after another, so that their clients do not all connect
// again in the same second.
//
// When the context is done, Close and Shutdown close the connections without a close
// handshake; Drain leaves sessions open, for Close. None of them loses received messages: the
// peer may send unacknowledged ones again on another connection. Received messages count
// against MaxBufferBytes of a server until they are settled or discarded, even after the end of
// their session. Unacknowledged sends return the cause of the end.
//
// [net/http.Server.Shutdown] neither closes sessions nor waits for them. Call Drain or Shutdown of
// the Server first, and then Shutdown or Close of the HTTP server.
//
// # Limits
//
// A message has at most [MaxPayload] bytes. [SessionOptions.MaxBufferBytes] bounds the receive
// buffer: the unsettled messages and the unread bytes of streams. When it is full, reads are
// paused (backpressure), and a dialling end sends keepalives. Bytes of a stream that were read
// do not count, so that two streams that are both being read never block each other.
// A session has at most 256 received streams that are announced or open.
// A stream may have any length, but less than 2 GiB if the receiver pulls.
// A sent stream holds four chunks of the default size in memory, or one larger chunk.
// Compression is never negotiated.
package cryo
