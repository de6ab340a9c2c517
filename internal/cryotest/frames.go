package cryotest

import "github.com/cryo-connect/cryo-connect/cryo"

// EndpointInfo is what every endpoint says first.
func EndpointInfo(number uint32) cryo.Frame {
	return cryo.Frame{
		Type: cryo.TypeEndpointInfo, Ack: number,
		Version: cryo.ProtocolVersion, Features: cryo.FeatureTransactions,
	}
}

// Text is a UTF8DATA frame.
func Text(number uint32, text string) cryo.Frame {
	return cryo.Frame{Type: cryo.TypeUTF8, Ack: number, Payload: payload(text)}
}

// Binary is a BINARYDATA frame.
func Binary(number uint32, data string) cryo.Frame {
	return cryo.Frame{Type: cryo.TypeBinary, Ack: number, Payload: payload(data)}
}

// Error is an ERROR frame.
func Error(number uint32, text string) cryo.Frame {
	return cryo.Frame{Type: cryo.TypeError, Ack: number, Payload: payload(text)}
}

// Acked is an ACK frame.
func Acked(number uint32) cryo.Frame { return cryo.Frame{Type: cryo.TypeAck, Ack: number} }

// Ping is a Cryo ping.
func Ping(number uint32) cryo.Frame {
	return cryo.Frame{Type: cryo.TypePingPong, Ack: number, Payload: []byte("ping")}
}

// Pong is a Cryo pong.
func Pong(number uint32) cryo.Frame {
	return cryo.Frame{Type: cryo.TypePingPong, Ack: number, Payload: []byte("pong")}
}

// Bye is a BYE frame.
func Bye(number uint32, reason string) cryo.Frame {
	return cryo.Frame{Type: cryo.TypeBye, Ack: number, Payload: payload(reason)}
}

func payload(text string) []byte {
	if text == "" {
		return nil
	}
	return []byte(text)
}
