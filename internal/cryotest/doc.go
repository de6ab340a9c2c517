// Package cryotest plays the other end of a Cryo connection for tests: a [Peer]
// that sends and expects single frames, as a server or as a client, over real
// connections or over connections in memory, which work with testing/synctest.
package cryotest
