package plugin

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

const (
	// filesInterval is the minimum time between two reads of a listener's files, because clients
	// cause them.
	filesInterval = time.Second

	// writeTime is the interval within which a file that is being written in place changes again. Until it is
	// written, its last line may be a part of a token.
	writeTime = 100 * time.Millisecond

	// pauseTime is the longest pause in writing a file of lines in place. A last line without an end
	// counts as complete after it.
	pauseTime = 5 * time.Second

	// shortageTime is the patience of components that are built: with -w, the engine has ended the
	// previous pipeline before it builds this one, and it does not try again if it cannot read the
	// configuration either.
	shortageTime = 30 * time.Second

	// maxFile is the maximum size of a file, in bytes.
	maxFile = 1 << 20
)

// watchedFiles holds a value loaded from files, and reloads it when their contents have
// changed. It compares contents, because a new file may have the time and the size of the old one.
// Symbolic links are followed: Kubernetes mounts secrets as links, and replaces all of them at once.
// Its method may be called from any goroutine.
type watchedFiles[T any] struct {
	what     string // for log lines
	paths    []string
	interval time.Duration // minimum time between two reads; 0: every call to current reads the files
	lines    bool          // a last line without an end may be a part of one; see isIncomplete
	load     func(contents [][]byte) (T, error)
	log      *service.Logger // has the path only once the file is read: it may be a token in place of it

	mu     sync.Mutex
	loaded T
	sums   [][sha256.Size]byte // hashes of the contents that loaded is from
	read   time.Time
	file   os.FileInfo         // identity of the file when it was loaded; only with lines
	seen   [][sha256.Size]byte // hashes of contents that may be incomplete …
	seenAt time.Time           // … and the time of their first read
	failed string              // the last error, which is logged only once; empty if there was none
}

// watchFiles loads the files. The errors of load must not contain secrets. While file descriptors are
// missing, it tries again until patience is over.
func watchFiles[T any](what string, paths []string, interval, patience time.Duration, log *service.Logger, load func(contents [][]byte) (T, error)) (*watchedFiles[T], error) {
	f := &watchedFiles[T]{what: what, paths: paths, interval: interval, load: load, log: log, read: time.Now()}
	contents, sums, err := readFiles(paths)
	for begin := time.Now(); err != nil; contents, sums, err = readFiles(paths) {
		kind, hint := shortageOf(err)
		if kind == "" {
			break
		}
		if time.Since(begin) >= patience {
			err = fmt.Errorf("%w: %s", err, hint)
			break
		}
		number, _ := errors.AsType[syscall.Errno](err) // err has the path, which may be a token
		log.With("error", fmt.Errorf("%w: %s", number, hint)).Warn("Cannot read " + what + "; retrying")
		time.Sleep(time.Second)
	}
	if err == nil {
		f.sums = sums
		f.loaded, err = load(contents)
	}
	return f, err
}

// expectLines declares the content of the only file to be lines; see isIncomplete. Call it before current.
func (f *watchedFiles[T]) expectLines() {
	f.lines = true
	f.file, _ = os.Stat(f.paths[0])
}

// current returns the value of the files. If they have changed, it reloads them first.
// If that fails, it logs the error, and the previous result stays in use.
func (f *watchedFiles[T]) current() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.read) >= f.interval {
		f.read = now
		f.refresh()
	}
	return f.loaded
}

// refresh reads the files. Some may be replaced one after the other, such as a certificate and its
// key, so contents that cannot be loaded, or are being written, are loaded again at the next read.
func (f *watchedFiles[T]) refresh() {
	contents, sums, err := readFiles(f.paths)
	if err == nil && slices.Equal(sums, f.sums) {
		f.failed = ""
		return
	}
	var loaded T
	if err == nil {
		loaded, err = f.load(contents)
		if (err == nil || err.Error() != f.failed) && f.isBeingWritten(sums) || err == nil && f.isIncomplete(contents, sums) {
			return
		}
	}
	switch {
	case err == nil:
		f.loaded, f.sums, f.failed = loaded, sums, ""
		if f.lines {
			f.file, _ = os.Stat(f.paths[0])
		}
		f.log.Info("Reloaded " + f.what)
	case err.Error() != f.failed:
		f.failed = err.Error()
		f.log.With("error", err).Error("Cannot reload " + f.what + ": the previous content stays in use")
	}
}

// isBeingWritten reports whether the files do not have these contents any more after writeTime.
func (f *watchedFiles[T]) isBeingWritten(sums [][sha256.Size]byte) bool {
	time.Sleep(writeTime)
	_, now, err := readFiles(f.paths)
	return err != nil || !slices.Equal(now, sums)
}

// isIncomplete reports whether the last line of a file that has changed in place may be a part of one.
// A file that was renamed over the previous one is complete, and so is one that was written long ago.
func (f *watchedFiles[T]) isIncomplete(contents [][]byte, sums [][sha256.Size]byte) bool {
	if !f.lines || bytes.HasSuffix(contents[0], []byte("\n")) {
		return false
	}
	if file, err := os.Stat(f.paths[0]); err == nil && (!os.SameFile(file, f.file) || time.Since(file.ModTime()) >= pauseTime) {
		return false
	}
	if !slices.Equal(sums, f.seen) {
		f.seen, f.seenAt = sums, time.Now()
	}
	return time.Since(f.seenAt) < pauseTime
}

func readFiles(paths []string) (contents [][]byte, sums [][sha256.Size]byte, err error) {
	for _, path := range paths {
		content, err := readFile(path)
		if err != nil {
			return nil, nil, err
		}
		contents, sums = append(contents, content), append(sums, sha256.Sum256(content))
	}
	return contents, sums, nil
}

// fileTimeout bounds the reading of a file that is a pipe.
const fileTimeout = 2 * time.Second

// readFile does not wait for a writer of a named pipe, nor for long for one that writes nothing,
// because attempts to connect and clients wait for it.
func readFile(path string) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	_ = file.SetReadDeadline(time.Now().Add(fileTimeout)) // regular files have none
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err == nil && len(content) > maxFile {
		err = fmt.Errorf("%s is larger than 1 MiB", path)
	}
	return content, err
}
