package cryo

import "context"

// Broadcast sends the same messages to several sessions side by side, and waits
// until each peer has acknowledged, or the context is done. The errors are by
// session: each is what [Session.SendBatch] returns. A slow session holds up
// nobody but the caller.
//
// The messages are checked and made frames once; but for its header of a few
// bytes, a frame is the same memory for all sessions until it is written.
func Broadcast(ctx context.Context, sessions []*Session, messages []Outgoing) []error {
	errs := make([]error, len(sessions))
	if ctx.Err() != nil {
		for i := range errs {
			errs[i] = allFailed(len(messages), contextError(ctx))
		}
		return errs
	}
	batch := checkBatch(messages)
	sendings := make([]Sending, len(sessions))
	for i, s := range sessions {
		sendings[i] = s.start(batch)
	}
	for i := range sendings {
		errs[i] = sendings[i].Wait(ctx)
	}
	return errs
}
