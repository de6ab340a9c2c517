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
