package testkit

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Patience bounds every wait for an event that must come. Only a test that fails waits
// for so long.
const Patience = time.Minute

// Next waits for the next value of a channel.
func Next[T any](tb testing.TB, values <-chan T) T {
	tb.Helper()
	select {
	case v := <-values:
		return v
	case <-time.After(Patience):
		require.FailNow(tb, "timed out waiting for a value")
		panic("unreachable")
	}
}

// Go runs f in a goroutine, and returns a channel that receives its result.
func Go(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// WantPending fails the test if there is a result already. Use it for an operation that
// must wait, when whatever could end it has happened.
func WantPending(tb testing.TB, done <-chan error, why string) {
	tb.Helper()
	select {
	case err := <-done:
		require.FailNow(tb, "ended early", "%s: %v", why, err)
	default:
	}
}

// Eventually repeats f until none of its assertions fails.
func Eventually(tb testing.TB, f func(c *assert.CollectT)) {
	tb.Helper()
	require.EventuallyWithT(tb, f, Patience, 10*time.Millisecond)
}

// Context returns a context that ends after [Patience]; unlike the test's own, it can be
// used in a cleanup.
func Context(tb testing.TB) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	tb.Cleanup(cancel)
	return ctx
}
