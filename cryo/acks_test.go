package cryo

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

// Only here can a test get to the end of the numbers.

// registered is a call of so many frames that the table knows, and their numbers.
func registered(t *ackTable, frames int) (c *call, numbers []uint32) {
	c = &call{}
	c.init(frames)
	t.register(c)
	for i := range c.frames {
		numbers = append(numbers, c.frames[i].Ack)
	}
	return c, numbers
}

// written is registered, and all frames are written then.
func written(t *ackTable, frames int) (c *call, numbers []uint32) {
	c, numbers = registered(t, frames)
	for i := range c.frames {
		c.frames[i].state.Or(frameDequeued)
		t.released(&c.frames[i], true)
	}
	return c, numbers
}

func isDone(c *call) bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func TestNumbersWrapAndSkipUnansweredOnes(t *testing.T) {
	for _, base := range []uint32{dialingNumbers, listeningNumbers} {
		for _, first := range []uint32{0, 1, 12_345, numberMask - 2, numberMask} {
			at := func(i uint32) uint32 { return base + (first+i)&numberMask }
			acks := newAckTable(base, first)
			want := func(want answerResult, number uint32, msg ...any) {
				t.Helper()
				require.Equal(t, want, acks.answer(number, nil), msg...)
			}
			want(answerForeign, at(0))
			require.Equal(t, at(0), acks.number())
			c, awaited := written(acks, 2)
			require.Equal(t, []uint32{at(1), at(2)}, awaited)
			want(answerUnknown, at(0))
			for i := range uint32(3) {
				want(answerForeign, at(i)^0x80000000, "the other end's")
				want(answerForeign, at(i)^0x40000000, "nobody's")
			}
			want(answerForeign, at(3))
			want(answerForeign, at(numberMask))

			acks.next = numberMask
			require.Equal(t, at(numberMask), acks.number(), "the last one")
			require.Equal(t, at(0), acks.number(), "the first again")
			require.Equal(t, at(3), acks.number(), "but none that is awaited")
			want(answerUnknown, at(4), "all were used once")
			want(answerForeign, base-1)
			want(answerForeign, base+numberMask+1)

			want(answerAccepted, at(1))
			require.Equal(t, answerUnknown, acks.answer(at(1), errors.New("too late")))
			require.False(t, isDone(c))
			acks.cancel(c, errors.New("no answer"))
			require.True(t, isDone(c))
			require.Equal(t, []error{nil, errors.New("no answer")}, acks.errors(c))
			require.Zero(t, acks.waiting)
			want(answerLate, at(2))
			want(answerUnknown, at(2), "it is late once")
		}
	}
}

// Each frame must be released by the writer and settled, in either order. Written and
// answered settles it, whatever comes first.
func TestCallIsDoneWhenEachFrameIsReleasedAndCompleted(t *testing.T) {
	no, other := errors.New("no"), errors.New("too late")
	for name, c := range map[string]struct {
		steps []string // behind the last of which it is done
		want  error
	}{
		"written, acknowledged":              {[]string{"take", "write", "ack"}, nil},
		"written, rejected":                  {[]string{"take", "write", "reject"}, no},
		"acknowledged, written":              {[]string{"take", "ack", "write"}, nil},
		"rejected, written":                  {[]string{"take", "reject", "write"}, no},
		"acknowledged, then rejected":        {[]string{"take", "ack", "repeat", "write"}, nil},
		"rejected, then acknowledged":        {[]string{"take", "reject", "repeat", "write"}, no},
		"acknowledged before it is sent":     {[]string{"premature", "premature", "take", "ack", "write"}, nil},
		"withdrawn":                          {[]string{"cancel", "drop"}, other},
		"withdrawn, then acknowledged":       {[]string{"cancel", "late", "drop"}, other},
		"cancelled while it is written":      {[]string{"take", "cancel", "late", "unknown", "write"}, other},
		"cancelled when it is written":       {[]string{"take", "write", "cancel"}, other},
		"acknowledged, cancelled, written":   {[]string{"take", "ack", "cancel", "late", "write"}, other},
		"rejected, cancelled, written":       {[]string{"take", "reject", "cancel", "write"}, other},
		"the end before it is sent":          {[]string{"drop", "end"}, other},
		"not written, and the end":           {[]string{"take", "drop", "end"}, other},
		"acknowledged, not written, the end": {[]string{"take", "ack", "drop", "end"}, other},
		"not written, acknowledged, the end": {[]string{"take", "drop", "ack", "end"}, other},
		"the end while it is written":        {[]string{"take", "end", "write"}, other},
	} {
		for _, size := range []int{1, 3} { // of the call
			t.Run(name, func(t *testing.T) {
				acks := newAckTable(dialingNumbers, 0)
				sent, numbers := registered(acks, size)
				for i := range size - 1 {
					sent.frames[i].state.Or(frameDequeued)
					acks.released(&sent.frames[i], true)
					require.Equal(t, answerAccepted, acks.answer(numbers[i], nil))
				}
				f, number := &sent.frames[size-1], numbers[size-1]
				for i, step := range c.steps {
					require.False(t, isDone(sent), "before %v", c.steps[i:])
					switch step {
					case "take":
						f.state.Or(frameDequeued)
					case "write":
						acks.released(f, true)
					case "drop":
						acks.released(f, false)
					case "ack":
						require.Equal(t, answerAccepted, acks.answer(number, nil))
					case "reject":
						require.Equal(t, answerAccepted, acks.answer(number, no))
					case "repeat":
						require.Equal(t, answerRepeated, acks.answer(number, nil))
						require.Equal(t, answerRepeated, acks.answer(number, no))
					case "premature":
						require.Equal(t, answerPremature, acks.answer(number, nil))
					case "late":
						require.Equal(t, answerLate, acks.answer(number, nil))
					case "unknown":
						require.Equal(t, answerUnknown, acks.answer(number, nil))
					case "cancel":
						acks.cancel(sent, other)
					case "end":
						acks.end(other)
					default:
						require.Fail(t, step)
					}
				}
				require.True(t, isDone(sent))
				require.Zero(t, acks.waiting)
				acks.cancel(sent, errors.New("after the end of the wait"))
				if c.want == nil {
					require.Nil(t, acks.errors(sent))
				} else {
					require.Equal(t, c.want, acks.errors(sent)[size-1])
				}
			})
		}
	}
}

func TestEmptyTableShrinks(t *testing.T) {
	acks := newAckTable(dialingNumbers, 0)
	for range 2 {
		c, numbers := written(acks, 10*maxIdleSlots)
		for i, number := range numbers {
			require.NotEmpty(t, acks.slots, "%d are settled", i)
			require.Equal(t, answerAccepted, acks.answer(number, nil))
		}
		require.True(t, isDone(c))
		require.Empty(t, acks.slots)
	}
}

// A frame that gets no answer keeps its slot while the numbers go round the table, and
// the table grows around it.
func TestLongUnansweredNumbersKeepTheirSlots(t *testing.T) {
	acks := newAckTable(listeningNumbers, 0)
	awaited := make(map[uint32]*call)
	for round := range 300 {
		c, numbers := written(acks, 1+round%7)
		for _, number := range numbers {
			require.NotContains(t, awaited, number)
		}
		awaited[numbers[0]] = c
		require.NotEqual(t, answerAccepted, acks.answer(numbers[0]+minSlots<<10, nil), "its slot, but another number")
		for _, number := range numbers[1:] {
			require.Equal(t, answerAccepted, acks.answer(number, nil))
		}
	}
	require.Equal(t, 300, acks.waiting)
	for number, c := range awaited {
		require.False(t, isDone(c))
		require.Equal(t, answerAccepted, acks.answer(number, nil))
		require.True(t, isDone(c))
	}
	require.Zero(t, acks.waiting)
}

func TestEndCompletesEveryFrame(t *testing.T) {
	acks := newAckTable(dialingNumbers, 0)
	c, numbers := written(acks, 3)
	require.Equal(t, answerAccepted, acks.answer(numbers[1], nil))
	end := errors.New("the end")
	acks.end(end)
	require.True(t, isDone(c))
	require.Equal(t, []error{end, nil, end}, acks.errors(c))
	require.Zero(t, acks.waiting)
	late, _ := registered(acks, 2)
	acks.drop(late.frames)
	require.True(t, isDone(late))
	require.Equal(t, []error{end, end}, acks.errors(late))
}

func TestCancelledNumbersAreBounded(t *testing.T) {
	acks := newAckTable(dialingNumbers, 0)
	c, numbers := written(acks, maxTimedOut+1)
	acks.cancel(c, errors.New("no answer"))
	require.LessOrEqual(t, len(acks.timedOut), maxTimedOut)
	require.Equal(t, answerUnknown, acks.answer(numbers[0], nil))
	require.Equal(t, answerLate, acks.answer(numbers[maxTimedOut], nil))
}
