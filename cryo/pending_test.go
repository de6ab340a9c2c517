package cryo

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Only here can a test get to the end of the numbers.

func TestNumbersWrapWithinTheirRangeAndAroundThoseThatAreAwaited(t *testing.T) {
	for _, base := range []uint32{dialingNumbers, listeningNumbers} {
		for _, first := range []uint32{0, 1, 12_345, numberMask - 2, numberMask} {
			at := func(i uint32) uint32 { return base + (first+i)&numberMask }
			p := newPending(base, first)
			require.False(t, p.issued(at(0)))
			require.Equal(t, at(0), p.number())
			var awaited []uint32
			batch, err := p.register(2, func(_ int, number uint32) { awaited = append(awaited, number) })
			require.NoError(t, err)
			require.Equal(t, []uint32{at(1), at(2)}, awaited)
			for i := range uint32(3) {
				require.True(t, p.issued(at(i)))
				require.False(t, p.issued(at(i)^0x80000000), "the other end's")
				require.False(t, p.issued(at(i)^0x40000000), "nobody's")
			}
			require.False(t, p.issued(at(3)))
			require.False(t, p.issued(at(numberMask)))

			p.next = numberMask
			require.Equal(t, at(numberMask), p.number(), "the last one")
			require.Equal(t, at(0), p.number(), "the first again")
			require.Equal(t, at(3), p.number(), "but none that somebody waits for")
			require.True(t, p.issued(at(4)), "all were used once")
			require.False(t, p.issued(base-1))
			require.False(t, p.issued(base+numberMask+1))

			require.True(t, p.settle(at(1), nil))
			require.False(t, p.settle(at(1), errors.New("too late")))
			p.abandon(batch, errors.New("no answer"))
			<-batch.done
			require.Equal(t, []error{nil, errors.New("no answer")}, batch.errs)
			require.Zero(t, p.waiting)
		}
	}
}

// A frame is settled when it is written and answered, whatever comes first.
func TestAFrameIsSettledWhenItIsWrittenAndAnswered(t *testing.T) {
	no, other := errors.New("no"), errors.New("too late")
	for name, c := range map[string]struct {
		steps []string
		want  error
	}{
		"written, acknowledged":               {[]string{"written", "ack"}, nil},
		"written, rejected":                   {[]string{"written", "reject"}, no},
		"sending, written, acknowledged":      {[]string{"sending", "written", "ack"}, nil},
		"sending, acknowledged, written":      {[]string{"sending", "ack", "written"}, nil},
		"sending, rejected, written":          {[]string{"sending", "reject", "written"}, no},
		"acknowledged, then rejected":         {[]string{"sending", "ack", "reject", "written"}, nil},
		"rejected, then acknowledged":         {[]string{"sending", "reject", "ack", "written"}, no},
		"early":                               {[]string{"early", "early", "sending", "ack", "written"}, nil},
		"acknowledged, given up, written":     {[]string{"sending", "ack", "give up", "unknown", "written"}, other},
		"rejected, given up, written":         {[]string{"sending", "reject", "give up", "written", "unknown"}, other},
		"given up, then written and answered": {[]string{"give up", "sending", "written", "unknown"}, other},
		"acknowledged, and the end":           {[]string{"sending", "ack", "end", "written"}, other},
	} {
		for _, size := range []int{1, 3} { // of the batch
			t.Run(name, func(t *testing.T) {
				p := newPending(dialingNumbers, 0)
				var frames []outgoing
				batch, err := p.register(size, func(i int, number uint32) {
					frames = append(frames, outgoing{Frame: wire.Frame{Ack: number}, index: i})
				})
				require.NoError(t, err)
				for i := range frames {
					frames[i].batch = batch
				}
				f := &frames[size-1]
				for _, other := range frames[:size-1] {
					other.progressed(frameWritten)
					require.Equal(t, answerTaken, p.answer(other.Ack, nil))
				}
				given := false // up, or the session has ended
				for i, step := range c.steps {
					select {
					case <-batch.done:
						require.True(t, given, "over before %v", c.steps[i:])
					default:
						require.False(t, given, "not over before %v", c.steps[i:])
					}
					given = given || step == "give up" || step == "end"
					switch step {
					case "sending":
						f.progressed(frameSending)
					case "written":
						if f.progressed(frameWritten)&frameAnswered != 0 {
							p.written(f.Ack, batch)
						}
					case "ack":
						require.Equal(t, answerTaken, p.answer(f.Ack, nil))
					case "reject":
						require.Equal(t, answerTaken, p.answer(f.Ack, no))
					case "early":
						require.Equal(t, answerEarly, p.answer(f.Ack, nil))
					case "unknown":
						require.Equal(t, answerUnknown, p.answer(f.Ack, nil))
					case "give up":
						p.abandon(batch, other)
					case "end":
						p.end(other)
					}
				}
				<-batch.done
				require.Zero(t, p.waiting)
				if c.want == nil {
					require.Nil(t, batch.errs)
				} else {
					require.Equal(t, c.want, batch.errs[size-1])
				}
			})
		}
	}
}

func TestTheRoomOfManyNumbersIsGivenBack(t *testing.T) {
	p := newPending(dialingNumbers, 0)
	for range 2 {
		var numbers []uint32
		batch, err := p.register(10*maxIdleTable, func(_ int, number uint32) { numbers = append(numbers, number) })
		require.NoError(t, err)
		for i, number := range numbers {
			require.NotEmpty(t, p.table, "%d are settled", i)
			require.True(t, p.settle(number, nil))
		}
		<-batch.done
		require.Empty(t, p.table)
	}
}

// Whoever gets no answer keeps its place while the numbers go round the table, and
// the table grows around it.
func TestNumbersThatAreAwaitedForLongKeepTheirPlaces(t *testing.T) {
	p := newPending(listeningNumbers, 0)
	awaited := make(map[uint32]*sendBatch)
	register := func(size int) (numbers []uint32) {
		batch, err := p.register(size, func(_ int, number uint32) { numbers = append(numbers, number) })
		require.NoError(t, err)
		for _, number := range numbers {
			require.NotContains(t, awaited, number)
			awaited[number] = batch
		}
		return numbers
	}
	for round := range 300 {
		numbers := register(1 + round%7)
		require.False(t, p.settle(numbers[0]+minTable<<10, nil), "its place, but another number")
		for _, number := range numbers[1:] {
			require.True(t, p.settle(number, nil))
			delete(awaited, number)
		}
	}
	require.Equal(t, 300, p.waiting)
	for number, batch := range awaited {
		select {
		case <-batch.done:
			require.Fail(t, "it is not settled")
		default:
		}
		require.True(t, p.settle(number, nil))
		<-batch.done
	}
	require.Zero(t, p.waiting)
}

func TestNobodyWaitsAfterTheEnd(t *testing.T) {
	p := newPending(dialingNumbers, 0)
	batch, err := p.register(3, func(int, uint32) {})
	require.NoError(t, err)
	require.True(t, p.settle(dialingNumbers+1, nil))
	end := errors.New("the end")
	p.end(end)
	<-batch.done
	require.Equal(t, []error{end, nil, end}, batch.errs)
	require.Zero(t, p.waiting)
	_, err = p.register(1, func(int, uint32) {})
	require.Equal(t, end, err)
}
