package main

import (
	"runtime/debug"
)

// A release build sets these variables; other builds use the build information of the binary:
//
//	go build -ldflags "-X main.releaseVersion=v1.2.3 -X main.releaseCommit=… -X main.releaseDate=…"
var (
	releaseVersion string
	releaseCommit  string
	releaseDate    string
)

const unknown = "unknown"

// buildStamp returns the version, including the commit if that is known, and the date of the
// build, or else of the commit. info is the build information of the binary; it may be nil.
func buildStamp(info *debug.BuildInfo) (version, date string) {
	version, commit, date := releaseVersion, releaseCommit, releaseDate
	if info != nil {
		vcs := make(map[string]string)
		for _, s := range info.Settings {
			vcs[s.Key] = s.Value
		}
		if version == "" && info.Main.Version != "(devel)" {
			version = info.Main.Version
		}
		if commit == "" && vcs["vcs.revision"] != "" {
			commit = vcs["vcs.revision"]
			if vcs["vcs.modified"] == "true" {
				commit += ", modified"
			}
		}
		if date == "" {
			date = vcs["vcs.time"]
		}
	}
	if version == "" {
		version = unknown
	}
	if commit != "" {
		version += " (commit " + commit + ")"
	}
	if date == "" {
		date = unknown
	}
	return version, date
}
