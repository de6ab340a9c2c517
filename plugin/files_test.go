package plugin

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// replaceFile replaces a file by one with the same time.
func replaceFile(t testing.TB, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path+".new", []byte(content), 0o600))
	require.NoError(t, os.Chtimes(path+".new", time.Unix(1, 0), time.Unix(1, 0)))
	require.NoError(t, os.Rename(path+".new", path))
}

// requests are the requests that a server receives.
type requests struct {
	mu  sync.Mutex
	all []*http.Request
}

// serveAnyToken is serve with a server that accepts every token and records it.
func (e *engine) serveAnyToken() (*server, *requests) {
	r := &requests{}
	s := e.serveBehind(func(server http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			r.mu.Lock()
			r.all = append(r.all, req.Clone(req.Context()))
			r.mu.Unlock()
			query := req.URL.Query()
			query.Set("authorization", "Bearer "+token)
			req.URL.RawQuery = query.Encode()
			server.ServeHTTP(w, req)
		})
	})
	return s, r
}

func (r *requests) last() *http.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all[len(r.all)-1]
}

func (r *requests) token() string {
	return strings.TrimPrefix(r.last().URL.Query().Get("authorization"), "Bearer ")
}

// lose ends a session that has lasted long enough to reconnect without a wait.
func lose(s *cryo.Session) {
	time.Sleep(time.Minute)
	end(s)
}

func TestTokenFileIsReadAtEachAttempt(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	replaceFile(t, file, "first-s3cret\n")
	inEngine(t, func(t *testing.T, e *engine) {
		const failure = "ERROR Cannot reload token_file: the previous content stays in use"
		server, requests := e.serveAnyToken()
		e.run("cryo: { url: ws://"+somewhere+", token_file: "+file+" }", toProbe)
		s := server.session()
		require.Equal(t, "first-s3cret", requests.token())

		replaceFile(t, file, "other-s3cret\r\n")
		lose(s)
		s = server.session()
		require.Equal(t, "other-s3cret", requests.token())
		require.Equal(t, 1, e.log.count("INFO Reloaded token_file", "file="+file))

		for _, content := range []string{"", "\n", "tab\tsecond-s3cret", "two-s3crets\nthree-s3crets", "\xff\xfe"} {
			replaceFile(t, file, content)
			lose(s)
			s = server.session()
			require.Equal(t, "other-s3cret", requests.token(), "%q", content)
		}
		require.Equal(t, 1, e.log.count(failure, "error=the file is empty"), "logged once")
		require.Equal(t, 1, e.log.count(failure, "error=the content of the file contains an invisible character"))
		require.NoError(t, os.Remove(file))
		lose(s)
		s = server.session()
		require.Equal(t, "other-s3cret", requests.token())
		require.Equal(t, 1, e.log.count(failure, "error=open "+file))

		replaceFile(t, file, "4815162342")
		lose(s)
		server.session()
		require.Equal(t, "4815162342", requests.token())
		for _, line := range e.log.all() {
			require.NotContains(t, line, "s3cret")
			require.NotContains(t, line, "4815162342")
		}
	})
}

func TestTokensFileIsReadWhenClientsConnect(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens")
	replaceFile(t, file, "first-s3cret\n\r\n4815162342\r\n\n")
	inEngine(t, func(t *testing.T, e *engine) {
		const failure = "ERROR Cannot reload tokens_file: the previous content stays in use"
		e.run("cryo_server: { address: '"+somewhere+"', tokens_file: "+file+" }", toProbe)
		admits := func(token string) bool {
			s, err := e.tryDial(cryo.DialOptions{Token: token})
			if err != nil {
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
				return false
			}
			end(s)
			return true
		}
		stays, err := e.tryDial(cryo.DialOptions{Token: "first-s3cret"})
		require.NoError(t, err)
		require.True(t, admits("4815162342"))
		require.False(t, admits(""))

		replaceFile(t, file, "other-s3cret\n\r\n4815162342\r\n\n")
		require.True(t, admits("first-s3cret"), "the file is not read for each client")
		time.Sleep(filesInterval)
		require.False(t, admits("first-s3cret"))
		require.True(t, admits("other-s3cret"))
		require.Equal(t, 1, e.log.count("INFO Reloaded tokens_file"))
		e.wantReceives(t, stays, "delivered")

		for _, content := range []string{"\n\r\n", "third-s3cret\n s3cret\n"} {
			replaceFile(t, file, content)
			for range 3 {
				time.Sleep(filesInterval)
				require.True(t, admits("other-s3cret"))
				require.False(t, admits("third-s3cret"))
			}
		}
		require.Equal(t, 1, e.log.count(failure, "error=the file has no token"), "logged once")
		require.Equal(t, 1, e.log.count(failure, "error=line 2 begins or ends with whitespace"))
		for _, line := range e.log.all() {
			require.NotContains(t, line, "s3cret")
		}
	})
}

// withTokensFile runs a test of a cryo_server input whose tokens_file has the token first-s3cret. write
// writes the file in place.
func withTokensFile(t *testing.T, test func(t *testing.T, e *engine, file string, write func(content string))) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "tokens")
	replaceFile(t, file, "first-s3cret\n")
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("cryo_server: { address: '"+somewhere+"', tokens_file: "+file+" }", toProbe)
		test(t, e, file, func(content string) { require.NoError(t, os.WriteFile(file, []byte(content), 0o600)) })
	})
}

// A part of a token must not be accepted.
func TestTokensFileThatIsBeingWrittenIsNotRead(t *testing.T) {
	withTokensFile(t, func(t *testing.T, e *engine, _ string, write func(content string)) {
		time.Sleep(filesInterval)
		write("other-s3cret\nthi")
		go func() {
			time.Sleep(writeTime / 2)
			write("other-s3cret\nthird-s3cret\n")
		}()
		e.wantDenied(cryo.DialOptions{Token: "thi"}, 401)
		end(e.join("first-s3cret", 1))
		time.Sleep(filesInterval)
		end(e.join("third-s3cret", 2))
		e.wantDenied(cryo.DialOptions{Token: "first-s3cret"}, 401)
	})
}

func TestPartialLineOfATokensFileIsNotAToken(t *testing.T) {
	withTokensFile(t, func(t *testing.T, e *engine, file string, write func(content string)) {
		for _, part := range []string{"other-s3cret\nthi", "other-s3cret\nthird-s3cret"} {
			time.Sleep(pauseTime - time.Second)
			write(part)
			e.wantDenied(cryo.DialOptions{Token: part[len("other-s3cret\n"):]}, 401)
			end(e.join("first-s3cret", 1))
		}
		time.Sleep(pauseTime)
		end(e.join("third-s3cret", 2))
		e.wantDenied(cryo.DialOptions{Token: "first-s3cret"}, 401)

		time.Sleep(filesInterval)
		write("fourth-s3cret\n")
		end(e.join("fourth-s3cret", 3))
		time.Sleep(filesInterval)
		replaceFile(t, file, "fifth-s3cret")
		end(e.join("fifth-s3cret", 4))
	})
}

// The first client may come long after the file was written, and may have a token that was removed.
func TestPartialLineThatWasWrittenLongAgoIsAToken(t *testing.T) {
	withTokensFile(t, func(t *testing.T, e *engine, file string, write func(content string)) {
		write("other-s3cret")
		require.NoError(t, os.Chtimes(file, time.Now(), time.Now()))
		time.Sleep(pauseTime)
		e.wantDenied(cryo.DialOptions{Token: "first-s3cret"}, 401)
		end(e.join("other-s3cret", 1))
	})
}

// A shell empties a file before it writes it.
func TestFileThatIsBeingWrittenLogsNoError(t *testing.T) {
	withTokensFile(t, func(t *testing.T, e *engine, _ string, write func(content string)) {
		time.Sleep(filesInterval)
		write("")
		go func() {
			time.Sleep(writeTime / 2)
			write("other-s3cret\n")
		}()
		end(e.join("first-s3cret", 1))
		time.Sleep(filesInterval)
		end(e.join("other-s3cret", 2))
		require.Zero(t, e.log.count("ERROR "))
		write("")
		for n := 1; n <= 3; n++ {
			time.Sleep(filesInterval)
			begin := time.Now()
			end(e.join("other-s3cret", 2))
			require.Equal(t, n == 1, time.Since(begin) > 0, "a client waits once")
		}
		require.Equal(t, 1, e.log.count("ERROR Cannot reload tokens_file"))
	})
}

func TestUnusableTokenFileIsAnErrorAtStart(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct{ name, content, problem string }{
		{"empty", "\n\n", "the file"},
		{"spaces", " s3cret\n", "begins or ends with whitespace"},
		{"large", strings.Repeat("s3cret\n", 200_000), "is larger than 1 MiB"},
		{"missing", "", "no such file or directory"},
	} {
		file := filepath.Join(dir, tt.name)
		if tt.content != "" {
			replaceFile(t, file, tt.content)
		}
		for _, c := range []struct{ kind, name, fields, field string }{
			{"input", "cryo", "url: ws://h\ntoken_file: ", "token_file"},
			{"output", "cryo", "url: ws://h\ntoken_file: ", "token_file"},
			{"input", "cryo_server", "address: 127.0.0.1:0\ntokens_file: ", "tokens_file"},
			{"output", "cryo_server", "address: 127.0.0.1:0\ntokens_file: ", "tokens_file"},
		} {
			err := construct(t, c.kind, c.name, c.fields+file)
			require.ErrorContains(t, err, "field "+c.field+": ")
			require.ErrorContains(t, err, tt.problem)
			require.NotContains(t, err.Error(), "s3cret")
			lints, err := linter().LintYAML(c.kind, []byte(c.name+":\n  "+strings.ReplaceAll(c.fields, "\n", "\n  ")+file))
			require.NoError(t, err)
			require.Equal(t, tt.content == "", len(lints) == 0, "a file that is missing here may exist elsewhere: %v", lints)
		}
	}
}

func TestTokenInPlaceOfItsFileIsNotShown(t *testing.T) {
	for _, c := range []struct{ kind, name, fields, field string }{
		{"output", "cryo", "url: ws://h\ntoken_file: ", "token"},
		{"input", "cryo_server", "address: 127.0.0.1:0\ntokens_file: ", "tokens"},
	} {
		for _, secret := range []string{"s3cret", "/s3cret", "//s3cret", "/s3cret/with+slashes==", "s3cret/with/slashes", strings.Repeat("s3cret.", 1000)} {
			err := construct(t, c.kind, c.name, c.fields+secret)
			require.ErrorContains(t, err, ": the path is redacted, because it may be a token: begin a path with its directory, such as ./, and set a token in the field "+c.field)
			require.NotContains(t, err.Error(), "s3cret")
			lints, err := linter().LintYAML(c.kind, []byte(c.name+":\n  "+strings.ReplaceAll(c.fields, "\n", "\n  ")+secret))
			require.NoError(t, err)
			require.NotContains(t, fmt.Sprint(lints), "s3cret")
		}
		for _, path := range []string{"./missing", "../missing", t.TempDir() + "/missing/token"} {
			require.ErrorContains(t, construct(t, c.kind, c.name, c.fields+path), "open "+path+": no such file or directory")
		}
	}
}

// withoutDescriptors makes the process open no further file until restore is called.
func withoutDescriptors(t testing.TB) (restore func()) {
	t.Helper()
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}))
	return func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }
}

func TestTokenInPlaceOfItsFileIsNotLoggedWithoutDescriptors(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		res := service.MockResources(service.MockResourcesOptUseLogger(service.NewLoggerFromSlog(e.log.logger())))
		for component, fields := range map[string]string{
			"input cryo":        "{ url: ws://h, token_file: s3cret }",
			"input cryo_server": "{ address: '" + somewhere + "', tokens_file: s3cret }",
		} {
			conf, err := specs()[component].ParseYAML(fields, nil)
			require.NoError(t, err)
			restore := withoutDescriptors(t)
			if component == "input cryo" {
				_, err = dependencies{}.input(conf, res)
			} else {
				_, err = dependencies{}.serverInput(conf, res)
			}
			restore()
			require.ErrorContains(t, err, "too many open files: the path is redacted")
			require.NotContains(t, err.Error(), "s3cret")
		}
		require.NotZero(t, e.log.count("WARN Cannot read tokens_file; retrying", "too many open files: raise the limit"))
		require.NotZero(t, e.log.count("WARN Cannot read token_file; retrying"))
		require.NotContains(t, fmt.Sprint(e.log.all()), "s3cret")
	})
}

func TestInterpolatedTokenIsEvaluatedAtEachAttempt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	replaceFile(t, file, "first-s3cret\n")
	t.Setenv("KEY_OF_THE_TEST", "key-s3cret")
	inEngine(t, func(t *testing.T, e *engine) {
		server, requests := e.serveAnyToken()
		read := fmt.Sprintf(`${! file(path: "%s", no_cache: true).string().trim() }`, file)
		e.run("cryo: { url: 'ws://"+somewhere+"?fixed=1', token: '"+read+`', headers: { X-Key: 'Key ${! env("KEY_OF_THE_TEST") }' }, query_parameters: { room: '`+read+"' } }", toProbe)
		s := server.session()
		want := func(token string) {
			require.Equal(t, token, requests.token())
			require.Equal(t, token, requests.last().URL.Query().Get("room"))
			require.Equal(t, "1", requests.last().URL.Query().Get("fixed"))
			require.Equal(t, "Key key-s3cret", requests.last().Header.Get("X-Key"))
		}
		want("first-s3cret")
		id := s.ID()
		replaceFile(t, file, "other-s3cret\n")
		lose(s)
		s = server.session()
		want("other-s3cret")
		require.Equal(t, id, s.ID(), "the same session with a renewed token")

		require.NoError(t, os.Remove(file))
		lose(s)
		time.Sleep(time.Minute)
		require.Equal(t, 1, e.log.count("Failed to connect to cryo", "evaluating the interpolation: open "+file+": no such file or directory")/e.log.count("Failed to connect to cryo"))
		require.Less(t, e.log.count("Failed to connect to cryo"), 15, "with back-off")
		replaceFile(t, file, "third-s3cret\n")
		server.session()
		want("third-s3cret")
		for _, line := range e.log.all() {
			require.NotContains(t, line, "s3cret")
		}
	})
}

func TestFailedInterpolationOfATokenIsRedacted(t *testing.T) {
	t.Setenv("KEY_OF_THE_TEST", "key-s3cret")
	for expression, sentence := range map[string]string{
		`env(name: "KEY_OF_THE_TEST", no_cache: true).parse_json()`:              "field token: evaluating the interpolation failed; the error is redacted, because it may contain a secret",
		`throw(env(name: "KEY_OF_THE_TEST", no_cache: true))`:                    "the error is redacted",
		`env(name: "KEY_OF_THE_TEST", no_cache: true).number()`:                  "the error is redacted",
		`env(name: "KEY_OF_THE_TEST", no_cache: true) + "\n"`:                    "field token begins or ends with whitespace",
		`env(name: "NO_SUCH_VARIABLE", no_cache: true)`:                          "field token: the interpolation returned nothing",
		`env(name: "KEY_OF_THE_TEST", no_cache: true).trim_prefix("key-s3cret")`: "field token: the interpolation returned nothing",
		`file(path: "nowhere/at/all", no_cache: true)`:                           "open nowhere/at/all: no such file or directory",
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run("cryo: { url: 'ws://"+somewhere+"', token: '${! "+expression+" }' }", toProbe)
			synctest.Wait()
			e.log.want(t, "Failed to connect to cryo", sentence)
			for _, line := range e.log.all() {
				require.NotContains(t, line, "s3cret")
			}
		})
	}
	for _, c := range []string{"token: '${! s3cret( }'", "query_parameters: { q: '${! s3cret = 1 }' }"} {
		err := construct(t, "input", "cryo", "url: ws://h\n"+c)
		require.ErrorContains(t, err, "contains an interpolation that is invalid or fails")
		require.NotContains(t, err.Error(), "s3cret")
	}
}

func TestOnlyOneSourceOfTokensMayBeSet(t *testing.T) {
	for fields, problem := range map[string]string{
		"tokens: [ a ]\ntokens_file: /f":                               "the fields tokens and tokens_file cannot be used together",
		"tokens_file: /f\nauthorize: root = true":                      "the fields tokens_file and authorize cannot be used together",
		"tokens: [ a ]\ntokens_file: /f\nauthorize: root = this.token": "the fields tokens and tokens_file and authorize cannot be used together",
	} {
		require.EqualError(t, construct(t, "input", "cryo_server", "address: 127.0.0.1:0\n"+fields), problem)
	}
	require.EqualError(t, construct(t, "output", "cryo", "url: ws://h\ntoken: '${! env(\"A\") }'\ntoken_file: /f"), "the fields token and token_file cannot be used together")
}

// A dialling component shows a renewed client certificate, and trusts a renewed authority.
func TestRenewedTLSFilesAreUsedByTheNextAttempt(t *testing.T) {
	servers, devices, others := newAuthority(t, "servers"), newAuthority(t, "devices"), newAuthority(t, "others")
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	copyFile := func(from, to string) {
		content, err := os.ReadFile(from)
		require.NoError(t, err)
		replaceFile(t, to, string(content))
	}
	servers.issue(t, "server", file("cert.pem"), file("key.pem"))
	devices.issue(t, "device-1", file("device.pem"), file("device.key"))
	copyFile(servers.file, file("ca.pem"))
	inEngine(t, func(t *testing.T, e *engine) {
		names := make(chan string, 100)
		s := &server{e: e, sessions: make(chan *cryo.Session, 100)}
		s.cryo = newServer(t, cryo.ServerOptions{Authorize: cryo.Tokens(token), OnSession: func(session *cryo.Session, u *cryo.Upgrade) {
			names <- u.Request.TLS.PeerCertificates[0].Subject.CommonName
			s.sessions <- session
		}})
		cert, err := tls.LoadX509KeyPair(file("cert.pem"), file("key.pem"))
		require.NoError(t, err)
		clients := x509.NewCertPool()
		clients.AddCert(devices.cert)
		socket, err := e.net.Listen("tcp", somewhere)
		require.NoError(t, err)
		s.http = &http.Server{Handler: s.cryo, ReadHeaderTimeout: time.Minute, ErrorLog: quiet}
		go func() {
			_ = s.http.Serve(tls.NewListener(socket, &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12}))
		}()
		t.Cleanup(s.shutdown)
		e.run(fmt.Sprintf("cryo: { url: wss://%s, token: %s, tls: { enabled: true, root_cas_file: %s, client_certs: [ { cert_file: %s, key_file: %s } ] } }",
			somewhere, token, file("ca.pem"), file("device.pem"), file("device.key")), toProbe)
		session := s.session()
		require.Equal(t, "device-1", next(t, names))

		devices.issue(t, "device-2", file("device.pem"), file("device.key"))
		lose(session)
		session = s.session()
		require.Equal(t, "device-2", next(t, names))
		require.Equal(t, 1, e.log.count("INFO Reloaded TLS files"))

		// An authority that is no certificate is not used.
		replaceFile(t, file("ca.pem"), "no certificate")
		lose(session)
		session = s.session()
		require.Equal(t, 1, e.log.count("ERROR Cannot reload TLS files: the previous content stays in use", "error=no certificate found in "+file("ca.pem")))

		copyFile(others.file, file("ca.pem"))
		lose(session)
		time.Sleep(time.Minute)
		e.log.want(t, "certificate signed by unknown authority")
		copyFile(servers.file, file("ca.pem"))
		s.session()
	})
}

func TestRenewedCertificateWithTheSameTimeAndSizeIsServed(t *testing.T) {
	ca := newAuthority(t, "ca")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	issue := func(name string) {
		ca.issue(t, name, certFile, keyFile)
		for _, file := range []string{certFile, keyFile} {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			replaceFile(t, file, string(content)+strings.Repeat("\n", 2000-len(content)))
		}
	}
	issue("first")
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "tls: { cert_file: "+certFile+", key_file: "+keyFile+" }"), toProbe)
		require.Equal(t, "first", e.served(t, ca.trusting()))
		issue("other")
		time.Sleep(filesInterval)
		require.Equal(t, "other", e.served(t, ca.trusting()))
	})
}

func TestTokenFileThatIsAPipeCausesNoDelay(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no named pipes in the file system")
	}
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, exec.CommandContext(t.Context(), "mkfifo", file).Run())
	_, err := readFile(file)
	require.NoError(t, err, "nobody writes")

	writer, err := os.OpenFile(file, os.O_RDWR, 0)
	require.NoError(t, err)
	defer writer.Close()
	_, err = readFile(file)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
}
