package loglimit_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/loglimit"
)

func TestAllowPermitsOneLinePerSecondAndCountsTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := loglimit.New()
		for _, suppressed := range []int64{0, 99, 99} {
			n, ok := limit.Allow()
			require.True(t, ok)
			require.Equal(t, suppressed, n)
			for range 99 {
				_, ok := limit.Allow()
				require.False(t, ok)
				time.Sleep(time.Millisecond)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(time.Hour)
		n, ok := limit.Allow()
		require.True(t, ok, "lines that were not written must not add up")
		require.EqualValues(t, 99, n)
		_, ok = limit.Allow()
		require.False(t, ok)
	})
}

func TestValuesAreLimitedSeparately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var limits loglimit.ByValue
		for _, value := range []int{401, 503} {
			_, ok := limits.Allow(value)
			require.True(t, ok, "the first line of a value")
			_, ok = limits.Allow(value)
			require.False(t, ok)
		}
		time.Sleep(time.Second)
		n, ok := limits.Allow(503)
		require.True(t, ok)
		require.EqualValues(t, 1, n)
	})
}
