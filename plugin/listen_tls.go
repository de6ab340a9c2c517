package plugin

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/redpanda-data/benthos/v4/public/service/securetls"
)

// TLS of a listener. Its files may change while it runs.

const (
	fieldCertFile     = "cert_file"
	fieldKeyFile      = "key_file"
	fieldClientCAFile = "client_ca_file"
	fieldClientAuth   = "client_auth"
	fieldMinVersion   = "min_version"

	clientAuthRequire = "require_valid"
	clientAuthIfGiven = "verify_if_given"

	// tlsFilesInterval is the shortest time between two checks of the files.
	tlsFilesInterval = time.Second
)

var tlsVersions = map[string]uint16{"tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13}

var (
	certFileField     = stringOf(fieldTLS+"."+fieldCertFile, anyText)
	keyFileField      = stringOf(fieldTLS+"."+fieldKeyFile, anyText)
	clientCAFileField = stringOf(fieldTLS+"."+fieldClientCAFile, anyText)
	clientAuthField   = oneOfDescribed(fieldTLS+"."+fieldClientAuth, map[string]string{
		clientAuthRequire: "A client without a certificate is denied.",
		clientAuthIfGiven: "A client may have no certificate, but not an invalid one.",
	}, clientAuthRequire, clientAuthIfGiven)
	minVersionField = oneOf(fieldTLS+"."+fieldMinVersion, "tls12", "tls13")
)

func listenTLSField() *service.ConfigField {
	return service.NewObjectField(fieldTLS,
		certFileField.config().
			Description("The path of a file with the server's certificate and those between it and the authority, PEM. Empty: no TLS.").
			Default(""),
		keyFileField.config().
			Description("The path of a file with its private key, PEM.").
			Default(""),
		clientCAFileField.config().
			Description("The path of a file with the certificates of authorities, PEM. With it, clients need a certificate of one of these, as well as their token.").
			Default("").
			Advanced(),
		clientAuthField.config().
			Description("What is asked of clients, with `client_ca_file`.").
			Default(clientAuthRequire).
			Advanced(),
		minVersionField.config().
			Description("The lowest version of TLS that a client may use.").
			Default("tls12").
			Advanced(),
	).
		Description("With a certificate and its key, clients connect by `wss://`; without, by `ws://`. Files that have changed are read again when the next client connects, at most once a second; nothing is restarted, and sessions stay connected. If the new files can't be used, an error is logged, the old ones stay in use, and the new ones are tried again.")
}

type tlsSettings struct {
	CertFile     string `field:"tls.cert_file"`
	KeyFile      string `field:"tls.key_file"`
	ClientCAFile string `field:"tls.client_ca_file"`
	ClientAuth   string `field:"tls.client_auth"`
	MinVersion   string `field:"tls.min_version"`
}

func readTLSSettings(r *settingsReader) tlsSettings {
	s := tlsSettings{
		CertFile:     certFileField.read(r),
		KeyFile:      keyFileField.read(r),
		ClientCAFile: clientCAFileField.read(r),
		ClientAuth:   clientAuthField.read(r),
		MinVersion:   minVersionField.read(r),
	}
	switch {
	case r.err != nil:
	case (s.CertFile == "") != (s.KeyFile == ""):
		r.err = fmt.Errorf("field %s needs both %s and %s", fieldTLS, fieldCertFile, fieldKeyFile)
	case s.ClientCAFile != "" && s.CertFile == "":
		r.err = fmt.Errorf("field %s: %s has no effect without %s and %s", fieldTLS, fieldClientCAFile, fieldCertFile, fieldKeyFile)
	}
	return s
}

// load reads the files.
func (s tlsSettings) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
	if err != nil {
		return nil, err
	}
	config := securetls.NewConfig(securetls.SecurityLevelNormal)
	config.MinVersion = tlsVersions[s.MinVersion]
	config.Certificates = []tls.Certificate{cert}
	config.NextProtos = []string{"http/1.1"} // no upgrade to WebSocket in HTTP/2
	if s.ClientCAFile == "" {
		return config, nil
	}
	pem, err := os.ReadFile(s.ClientCAFile)
	if err != nil {
		return nil, err
	}
	config.ClientCAs = x509.NewCertPool()
	if !config.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %s", s.ClientCAFile)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	if s.ClientAuth == clientAuthIfGiven {
		config.ClientAuth = tls.VerifyClientCertIfGiven
	}
	// A resumed connection would keep an authority that is not trusted any more.
	config.SessionTicketsDisabled = true
	return config, nil
}

// tlsFiles are the files of a listener, as last read.
type tlsFiles struct {
	settings tlsSettings
	log      *service.Logger

	mu      sync.Mutex
	config  *tls.Config
	checked time.Time
	read    [3]fileState // of the files that config was made of
	failed  string       // why the present files can't be used
}

// fileState shows whether a file has changed. That of a symbolic link is the file's, so
// that the links of Kubernetes, which change all at once, work.
type fileState struct {
	modified time.Time
	size     int64
}

// newTLSFiles reads the files. It returns nil for a listener without TLS.
func newTLSFiles(settings tlsSettings, log *service.Logger) (*tlsFiles, error) {
	if settings.CertFile == "" {
		return nil, nil
	}
	f := &tlsFiles{settings: settings, log: log, checked: time.Now()}
	f.read, _ = f.states() // a file without a state can't be loaded either
	var err error
	if f.config, err = settings.load(); err != nil {
		return nil, fmt.Errorf("field %s: %w", fieldTLS, err)
	}
	return f, nil
}

// configure is a GetConfigForClient: it returns the present configuration.
func (f *tlsFiles) configure(*tls.ClientHelloInfo) (*tls.Config, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.checked) >= tlsFilesInterval {
		f.checked = now
		f.refresh()
	}
	return f.config, nil
}

// refresh reads files that have changed. A certificate and its key may be
// replaced one after the other: what doesn't fit together is tried again each
// time, until it does.
func (f *tlsFiles) refresh() {
	now, err := f.states()
	if err == nil && now == f.read {
		f.failed = ""
		return
	}
	var config *tls.Config
	if err == nil {
		config, err = f.settings.load()
	}
	switch {
	case err == nil:
		f.config, f.read, f.failed = config, now, ""
		f.log.Infof("Read changed TLS files: the certificate is that of %s", f.settings.CertFile)
	case err.Error() != f.failed:
		f.failed = err.Error()
		f.log.Errorf("The changed TLS files can't be used, the old ones stay in use: %v", err)
	}
}

func (f *tlsFiles) states() (states [3]fileState, err error) {
	for i, path := range []string{f.settings.CertFile, f.settings.KeyFile, f.settings.ClientCAFile} {
		if path == "" {
			continue
		}
		info, statErr := os.Stat(path)
		if statErr != nil {
			err = errors.Join(err, statErr)
			continue
		}
		states[i] = fileState{info.ModTime(), info.Size()}
	}
	return states, err
}
