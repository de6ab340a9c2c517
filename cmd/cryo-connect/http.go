package main

import (
	"cmp"
	"errors"
	"net"
	"os"
	"slices"
	"strconv"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/urfave/cli/v2"
)

// httpAddressVariable is the environment variable that sets the default of the field
// http.address. The image sets it: in a container, loopback is the container's own.
const httpAddressVariable = "CRYO_CONNECT_HTTP_ADDRESS"

// defaultHTTPAddress returns the default of the field http.address. The engine's own default
// is all interfaces.
func defaultHTTPAddress() string {
	return cmp.Or(os.Getenv(httpAddressVariable), "127.0.0.1:4195")
}

// pingURL returns the URL of /ping on this machine, of an HTTP server with this address.
func pingURL(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err == nil && (host == "" || net.ParseIP(host).IsUnspecified()) {
		address = net.JoinHostPort("127.0.0.1", port)
	}
	return "http://" + address + "/ping"
}

const (
	commandStreams = "streams"
	flagAPI        = "api"
	flagNoAPI      = "no-api" // the engine's
)

// streamsAPI decides about the engine's API of streams mode. It shows the tokens of every
// pipeline and starts any other one, and so runs commands. The engine serves it unless
// --no-api is set; this binary only if --api is set, and http.basic_auth with it.
type streamsAPI struct {
	requested bool // by --api
}

// flags returns the flags that the engine adds to the commands run and streams.
func (*streamsAPI) flags() []cli.Flag {
	return []cli.Flag{&cli.BoolFlag{
		Name:  flagAPI,
		Usage: "serve the HTTP API that shows, starts and stops pipelines (streams mode only; requires http.basic_auth)",
	}}
}

// readFlags reads --api and sets --no-api accordingly. Like the engine's flags, --api may
// precede the command.
func (a *streamsAPI) readFlags(c *cli.Context) error {
	a.requested = slices.ContainsFunc(c.Lineage(), func(c *cli.Context) bool { return c.Bool(flagAPI) })
	if c.Command.Name != commandStreams {
		if a.requested {
			return errors.New("--api is a flag of the command streams: other commands have no API")
		}
		return nil
	}
	a.requested = a.requested && !c.Bool(flagNoAPI)
	return c.Set(flagNoAPI, strconv.FormatBool(!a.requested))
}

// checkConfig returns an error if the API is requested and the configuration does not
// require authentication. The engine calls it before it registers the API's paths, and has
// checked already that basic_auth has a user name and a password.
func (a *streamsAPI) checkConfig(conf *service.ParsedConfig) error {
	if !a.requested {
		return nil
	}
	authenticated, err := conf.FieldBool("http", "basic_auth", "enabled")
	if err == nil && !authenticated {
		err = errors.New("--api lets anyone who can reach the HTTP server run commands: set enabled, username and password_hash of http.basic_auth, or omit --api")
	}
	return err
}
