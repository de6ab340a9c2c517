package main

import (
	"bytes"
	"fmt"
	"strings"
)

const token = "bench"

// load is a measured transfer: a subject in this process, and its peer.
type load struct {
	name  string
	start func() (*running, error)
	unit  int // bytes of a message's payload

	sessions int // at least one message is sent for each
}

// The defaults of the loads.
const (
	window = 1024 // messages outstanding
	batch  = 64
	kib    = 1 << 10
)

func text(size int) []byte { return bytes.Repeat([]byte("x"), size) }

func fill(yaml, address string) string {
	return strings.NewReplacer("ADDRESS", address, "TOKEN", token).Replace(yaml)
}

const (
	bareInput    = `{ url: ws://ADDRESS, token: TOKEN, auto_replay_nacks: false, include_metadata: false }`
	defaultInput = `{ url: ws://ADDRESS, token: TOKEN }`
	streamInput  = `{ url: ws://ADDRESS, token: TOKEN, streams: { max_bytes: 0, scanner: { chunker: { size: 65536 } } } }`
	listen       = `{ address: ADDRESS, tokens: [ TOKEN ] }`
)

// input measures a receiving component of the engine.
func input(name, component, yaml string, spec peerSpec) load {
	spec.Source = true
	return load{name: "in/" + name, unit: spec.Size, sessions: spec.Sessions, start: func() (*running, error) {
		return receiving(spec, component+": "+yaml)
	}}
}

func cryoInput(name, yaml string, size, window int) load {
	return input(name, "cryo", yaml, peerSpec{Protocol: speaksCryo, Size: size, Window: window})
}

// serverInput has a number of sessions, which share the window.
func serverInput(name string, sessions, window int) load {
	return input(name, "cryo_server", listen, peerSpec{Protocol: speaksCryo, Size: kib, Window: window, Sessions: sessions})
}

func loopInput(kind, name string, size, window int) load {
	spec := peerSpec{Protocol: kind, Source: true, Size: size, Window: window}
	return load{name: "in/" + kind + name, unit: size, start: func() (*running, error) { return startLoop(spec) }}
}

// minimalInput is an input that costs no more than the engine.
func minimalInput(name string, size, window int) load {
	spec := peerSpec{Protocol: speaksCryo, Source: true, Size: size, Window: window}
	return load{name: "in/minimal" + name, unit: size, start: func() (*running, error) {
		p, err := startPeer(spec)
		if err != nil {
			return nil, err
		}
		return dropping(p, &minimal{address: p.address}, `own: {}`)
	}}
}

// output measures a sending component of the engine.
func output(name, component, yaml string, batch int, spec peerSpec) load {
	return load{name: "out/" + name, unit: spec.Size, start: func() (*running, error) {
		return sending(spec, batch, component+": "+yaml)
	}}
}

// cryoOutput has as many batches in flight as fill the window.
func cryoOutput(name string, size, batch, window int) load {
	yaml := fmt.Sprintf(`{ url: ws://ADDRESS, token: TOKEN, max_in_flight: %d }`, max(1, window/batch))
	return output(name, "cryo", yaml, batch, peerSpec{Protocol: speaksCryo, Size: size})
}

func serverOutput(name string, sessions int) load {
	yaml := fmt.Sprintf(`{ address: ADDRESS, tokens: [ TOKEN ], max_in_flight: %d }`, window/batch)
	return output(name, "cryo_server", yaml, batch, peerSpec{Protocol: speaksCryo, Size: kib, Sessions: sessions})
}

// streamOutput sends messages of 64 chunks as streams; a chunk counts as a
// message, as it does for streamInput.
func streamOutput(name string) load {
	const chunk, chunks = 64 * kib, 64
	l := output(name, "cryo", `{ url: ws://ADDRESS, token: TOKEN, message_type: stream, max_in_flight: 4 }`, 1,
		peerSpec{Protocol: speaksCryo, Size: chunk * chunks})
	start := l.start
	l.unit = chunk
	l.start = func() (*running, error) {
		r, err := start()
		if err != nil {
			return nil, err
		}
		streams := r.do
		r.do = func(n int) error { return streams((n + chunks - 1) / chunks) }
		return r, nil
	}
	return l
}

func loopOutput(kind, name string, size, window int) load {
	spec := peerSpec{Protocol: kind, Size: size, Window: window}
	return load{name: "out/" + kind + name, unit: size, start: func() (*running, error) { return startLoop(spec) }}
}

// loads are the loads of the table and the benchmarks.
var loads = []load{
	cryoInput("cryo-bare", bareInput, kib, window),
	cryoInput("cryo", defaultInput, kib, window),
	input("websocket", "websocket", `{ url: ws://ADDRESS }`, peerSpec{Protocol: speaksWebSocket, Size: kib}),
	loopInput(speaksGathered, "", kib, window),
	loopInput(speaksPlain, "", kib, window),

	cryoOutput("cryo", kib, batch, window),
	output("websocket", "websocket", `{ url: ws://ADDRESS }`, batch, peerSpec{Protocol: speaksWebSocket, Size: kib}),
	loopOutput(speaksGathered, "", kib, window),
	loopOutput(speaksPlain, "", kib, window),

	serverInput("cryo_server", 1, window),
	serverInput("cryo_server-100-sessions", 100, 100*batch), // a batch in flight for each
	input("socket_server", "socket_server", `{ network: tcp, address: ADDRESS, scanner: { lines: {} } }`,
		peerSpec{Protocol: speaksLines, Size: kib, Sessions: 1}),
	serverOutput("cryo_server", 1),

	cryoInput("cryo-bare-100B", bareInput, 100, window),
	loopInput(speaksGathered, "-100B", 100, window),
	cryoOutput("cryo-100B", 100, batch, window),
	loopOutput(speaksGathered, "-100B", 100, window),

	cryoInput("cryo-bare-one-at-a-time", bareInput, kib, 1),
	loopInput(speaksPlain, "-one-at-a-time", kib, 1),
	minimalInput("-one-at-a-time", kib, 1),
	cryoOutput("cryo-one-at-a-time", kib, 1, 1),
	loopOutput(speaksPlain, "-one-at-a-time", kib, 1),

	cryoInput("cryo-bare-16KiB", bareInput, 16*kib, window),
	loopInput(speaksGathered, "-16KiB", 16*kib, window),
	cryoOutput("cryo-16KiB", 16*kib, batch, window),
	loopOutput(speaksGathered, "-16KiB", 16*kib, window),
	cryoInput("cryo-bare-64KiB", bareInput, 64*kib, window),
	loopInput(speaksGathered, "-64KiB", 64*kib, window),
	cryoOutput("cryo-64KiB", 64*kib, batch, window),
	loopOutput(speaksGathered, "-64KiB", 64*kib, window),

	input("cryo-stream", "cryo", streamInput, peerSpec{Protocol: speaksStreams, Size: 64 * kib}),
	streamOutput("cryo-stream"),
}
