package ballast

import (
	"math"
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestUserSettingsTakePrecedence(t *testing.T) {
	for name, c := range map[string]struct {
		gogc    string
		limit   int64
		percent int
	}{
		"nothing":    {"", math.MaxInt64, percent},
		"GOMEMLIMIT": {"", 1 << 30, limited},
		"GOGC":       {"70", math.MaxInt64, 70},
		"both":       {"70", 1 << 30, 70},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("GOGC", c.gogc)
			before := debug.SetGCPercent(70) // as the runtime has done for GOGC
			limit := debug.SetMemoryLimit(c.limit)
			defer debug.SetMemoryLimit(limit)
			Load()
			require.Equal(t, c.percent, debug.SetGCPercent(before))
		})
	}
}
