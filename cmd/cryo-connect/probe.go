package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
)

const probeTimeout = 3 * time.Second

// probeCommand is the command probe. It is a health check, in particular for a container image
// without a shell.
var probeCommand = &cli.Command{
	Name:      "probe",
	Usage:     "Check the health of a running instance",
	ArgsUsage: "[URL]",
	Description: `The exit code is 0 if the response to a GET request for the URL has a status of 2xx; otherwise it is 1, and the
reason is written to standard error. The default URL is ` + pingURL(defaultHTTPAddress()) + ` (` + httpAddressVariable + ` sets another
address), which reports that the process runs; /ready instead reports whether its inputs and outputs are connected.`,
	Action: func(c *cli.Context) error {
		url := pingURL(defaultHTTPAddress())
		if c.NArg() > 0 {
			url = c.Args().First()
		}
		if err := probe(c.Context, url); err != nil {
			return cli.Exit(err, 1)
		}
		return nil
	},
}

// probe returns an error unless a GET request for the URL is answered with a status of 2xx.
func probe(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("%s responded with %s: %s", req.URL.Redacted(), resp.Status, strings.TrimSpace(string(body)))
	}
	return nil
}
