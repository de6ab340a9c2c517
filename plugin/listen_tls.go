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

// The TLS settings of a listener. Files that have changed are reloaded while it runs.

const (
	fieldCertFile     = "cert_file"
	fieldKeyFile      = "key_file"
	fieldClientCAFile = "client_ca_file"
	fieldClientAuth   = "client_auth"
	fieldMinVersion   = "min_version"

	clientAuthRequire = "require_valid"
	clientAuthIfGiven = "verify_if_given"

	// tlsFilesInterval is the minimum time between two checks of the files.
	tlsFilesInterval = time.Second
)

var tlsVersions = map[string]uint16{"tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13}

var (
	certFileField     = stringOf(fieldTLS+"."+fieldCertFile, anyText)
	keyFileField      = stringOf(fieldTLS+"."+fieldKeyFile, anyText)
	clientCAFileField = stringOf(fieldTLS+"."+fieldClientCAFile, anyText)
	clientAuthField   = oneOfDescribed(fieldTLS+"."+fieldClientAuth, map[string]string{
		clientAuthRequire: "A client without a certificate is denied.",
		clientAuthIfGiven: "A client without a certificate is accepted; one with an invalid certificate is denied.",
	}, clientAuthRequire, clientAuthIfGiven)
	minVersionField = oneOf(fieldTLS+"."+fieldMinVersion, "tls12", "tls13")
)

func listenTLSField() *service.ConfigField {
	return service.NewObjectField(fieldTLS,
		certFileField.config().
			Description("The path of a PEM file with the server's certificate and the intermediate ones. Empty: no TLS.").
			Default(""),
		keyFileField.config().
			Description("The path of a PEM file with the private key of the certificate.").
			Default(""),
		clientCAFileField.config().
			Description("The path of a PEM file with the certificates of authorities. If set, clients must have a certificate that one of these has signed, in addition to their token.").
			Default("").
			Advanced(),
		clientAuthField.config().
			Description("Whether clients must have a certificate, with `client_ca_file`.").
			Default(clientAuthRequire).
			Advanced(),
		minVersionField.config().
			Description("The lowest TLS version that a client may use.").
			Default("tls12").
			Advanced(),
	).
		Description("With a certificate and its key, clients connect by `wss://`; without, by `ws://`. Changed files are reloaded when the next client connects, at most once per second, without a restart; sessions stay connected. If the new files are invalid, an error is logged, the previous ones stay in use, and the new ones are tried again.")
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

// load reads the files and returns the TLS configuration.
func (s tlsSettings) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
	if err != nil {
		return nil, err
	}
	config := securetls.NewConfig(securetls.SecurityLevelNormal)
	config.MinVersion = tlsVersions[s.MinVersion]
	config.Certificates = []tls.Certificate{cert}
	config.NextProtos = []string{"http/1.1"} // HTTP/2 has no Upgrade header
	if s.ClientCAFile == "" {
		return config, nil
	}
	pem, err := os.ReadFile(s.ClientCAFile)
	if err != nil {
		return nil, err
	}
	config.ClientCAs = x509.NewCertPool()
	if !config.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate found in %s", s.ClientCAFile)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	if s.ClientAuth == clientAuthIfGiven {
		config.ClientAuth = tls.VerifyClientCertIfGiven
	}
	// A resumed connection would bypass a change of the certificate authorities.
	config.SessionTicketsDisabled = true
	return config, nil
}

// tlsFiles holds the TLS configuration of a listener, as last loaded from its files.
type tlsFiles struct {
	settings tlsSettings
	log      *service.Logger

	mu      sync.Mutex
	config  *tls.Config
	checked time.Time
	loaded  [3]fileState // the states of the files when config was loaded
	failed  string       // the last error, which is logged only once; empty if there was none
}

// fileState identifies a version of a file. Symbolic links are followed: Kubernetes mounts
// secrets as links, and replaces all of them at once.
type fileState struct {
	modified time.Time
	size     int64
}

// newTLSFiles loads the files. It returns nil if the listener does not use TLS.
func newTLSFiles(settings tlsSettings, log *service.Logger) (*tlsFiles, error) {
	if settings.CertFile == "" {
		return nil, nil
	}
	f := &tlsFiles{settings: settings, log: log, checked: time.Now()}
	f.loaded, _ = f.states() // load reports the error
	var err error
	if f.config, err = settings.load(); err != nil {
		return nil, fmt.Errorf("field %s: %w", fieldTLS, err)
	}
	return f, nil
}

// configure is the GetConfigForClient function of the listener. It reloads files that have
// changed.
func (f *tlsFiles) configure(*tls.ClientHelloInfo) (*tls.Config, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.checked) >= tlsFilesInterval {
		f.checked = now
		f.refresh()
	}
	return f.config, nil
}

// refresh reloads files that have changed. A certificate and its key may be replaced one after
// the other, so a pair that does not match is loaded again at the next check.
func (f *tlsFiles) refresh() {
	now, err := f.states()
	if err == nil && now == f.loaded {
		f.failed = ""
		return
	}
	var config *tls.Config
	if err == nil {
		config, err = f.settings.load()
	}
	switch {
	case err == nil:
		f.config, f.loaded, f.failed = config, now, ""
		f.log.With("cert_file", f.settings.CertFile).Info("Reloaded TLS files")
	case err.Error() != f.failed:
		f.failed = err.Error()
		f.log.With("error", err).Error("Cannot reload TLS files: the previous certificate stays in use")
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
