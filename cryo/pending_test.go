package cryo

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

// Only here can a test get to the end of the numbers.

func TestNumbersWrapWithinTheirRangeAndAroundThoseThatAreAwaited(t *testing.T) {
	for _, base := range []uint32{dialingNumbers, listeningNumbers} {
		p := newPending(base)
		require.Equal(t, base, p.number())
		var awaited []uint32
		batch, err := p.register(2, func(_ int, number uint32) { awaited = append(awaited, number) })
		require.NoError(t, err)
		require.Equal(t, []uint32{base + 1, base + 2}, awaited)
		require.False(t, p.issued(base+3))
		require.False(t, p.issued(base-1))

		p.next = numberMask
		require.Equal(t, base+numberMask, p.number(), "the last of the range")
		require.Equal(t, base, p.number(), "the first again")
		require.Equal(t, base+3, p.number(), "but none that somebody waits for")
		require.True(t, p.issued(base+4), "all were used once")
		require.False(t, p.issued(base-1))
		require.False(t, p.issued(base+numberMask+1))

		require.True(t, p.settle(base+1, nil))
		require.False(t, p.settle(base+1, errors.New("too late")))
		p.abandon(batch, errors.New("no answer"))
		<-batch.done
		require.Equal(t, []error{nil, errors.New("no answer")}, batch.errs)
		require.Empty(t, p.waiting)
	}
}

func TestTheRoomOfManyNumbersIsGivenBack(t *testing.T) {
	p := newPending(dialingNumbers)
	for range 2 {
		var numbers []uint32
		batch, err := p.register(10*maxIdleWaiting, func(_ int, number uint32) { numbers = append(numbers, number) })
		require.NoError(t, err)
		for i, number := range numbers {
			require.Equal(t, 10*maxIdleWaiting, p.most, "%d are settled", i)
			require.True(t, p.settle(number, nil))
		}
		<-batch.done
		require.Zero(t, p.most, "a new map")
	}
}

func TestNobodyWaitsAfterTheEnd(t *testing.T) {
	p := newPending(dialingNumbers)
	batch, err := p.register(3, func(int, uint32) {})
	require.NoError(t, err)
	require.True(t, p.settle(dialingNumbers+1, nil))
	end := errors.New("the end")
	p.end(end)
	<-batch.done
	require.Equal(t, []error{end, nil, end}, batch.errs)
	require.Empty(t, p.waiting)
	_, err = p.register(1, func(int, uint32) {})
	require.Equal(t, end, err)
}
