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

const (
	probeDefaultURL = "http://127.0.0.1:4195/ping"
	probeTimeout    = 3 * time.Second
)

// probeCommand is the health check of a container image that has no shell and
// no other program.
var probeCommand = &cli.Command{
	Name:      "probe",
	Usage:     "Ask a running cryo-connect how it is",
	ArgsUsage: "[URL]",
	Description: `Ends with exit code 0 if the URL answers with success, and says why not otherwise. Without a URL it is
` + probeDefaultURL + `, which tells whether the process lives; /ready there tells whether it is connected.`,
	Action: func(c *cli.Context) error {
		url := probeDefaultURL
		if c.NArg() > 0 {
			url = c.Args().First()
		}
		if err := probe(c.Context, url); err != nil {
			return cli.Exit(err, 1)
		}
		return nil
	},
}

// probe wants a URL to answer with success.
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
		return fmt.Errorf("%s answers %s: %s", url, resp.Status, strings.TrimSpace(string(body)))
	}
	return nil
}
