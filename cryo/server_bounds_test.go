package cryo_test

import (
	"math"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestHugeSessionLimitDoesNotOverflow(t *testing.T) {
	for _, limit := range []int{math.MaxInt, math.MaxInt/2 + 1} {
		synctest.Test(t, func(t *testing.T) {
			_, l, sessions := serve(t, cryo.ServerOptions{MaxSessions: limit})
			join(t, l, sid).ClientHandshake()
			next(t, sessions)
			join(t, l, sid).ClientHandshake()
			next(t, sessions) // that takes it over
		})
	}
}

func TestHookSeesTheValueOfASessionThatIsNotAnnouncedYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		values := make(chan any, 1)
		_, l, _ := serve(t, cryo.ServerOptions{
			SessionOptions: cryo.SessionOptions{
				SendOnly: true,
				OnReject: func(s *cryo.Session, _ cryo.Kind) { values <- s.Value() },
			},
			Authorize: func(u *cryo.Upgrade) error {
				u.Value = "a client"
				return nil
			},
		})
		peer := join(t, l, sid)
		peer.WriteFrames(cryotest.Text(1, "before ENDPOINT_INFO"))
		require.Equal(t, "a client", next(t, values))
	})
}
