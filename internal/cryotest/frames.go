package cryotest

import (
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// EndpointInfo is the first frame of every endpoint.
func EndpointInfo(number uint32) wire.Frame {
	return wire.Frame{
		Type: wire.EndpointInfo, Ack: number,
		Version: wire.Version, Features: wire.FeatureStreams,
	}
}

// Text is a UTF8DATA frame.
func Text(number uint32, text string) wire.Frame {
	return wire.Frame{Type: wire.UTF8, Ack: number, Payload: payload(text)}
}

// Binary is a BINARYDATA frame.
func Binary(number uint32, data string) wire.Frame {
	return wire.Frame{Type: wire.Binary, Ack: number, Payload: payload(data)}
}

// Error is an ERROR frame.
func Error(number uint32, text string) wire.Frame {
	return wire.Frame{Type: wire.Error, Ack: number, Payload: payload(text)}
}

// Acked is an ACK frame.
func Acked(number uint32) wire.Frame { return wire.Frame{Type: wire.Ack, Ack: number} }

// Ping is a Cryo ping.
func Ping(number uint32) wire.Frame {
	return wire.Frame{Type: wire.PingPong, Ack: number, Payload: []byte("ping")}
}

// Pong is a Cryo pong.
func Pong(number uint32) wire.Frame {
	return wire.Frame{Type: wire.PingPong, Ack: number, Payload: []byte("pong")}
}

// Bye is a BYE frame.
func Bye(number uint32, reason string) wire.Frame {
	return wire.Frame{Type: wire.Bye, Ack: number, Payload: payload(reason)}
}

func payload(text string) []byte {
	if text == "" {
		return nil
	}
	return []byte(text)
}
