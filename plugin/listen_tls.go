package plugin

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
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
			Description("The path of a PEM file with the server's certificate, followed by the intermediate ones. If empty, there is no TLS.").
			Default(""),
		keyFileField.config().
			Description("The path of a PEM file with the private key of the certificate.").
			Default(""),
		clientCAFileField.config().
			Description("The path of a PEM file with certificate authorities. If set, clients need a certificate signed by one of them, in addition to their token.").
			Default("").
			Advanced(),
		clientAuthField.config().
			Description("Whether clients must present a certificate. Applies only with `client_ca_file`.").
			Default(clientAuthRequire).
			Advanced(),
		minVersionField.config().
			Description("The lowest TLS version that a client may use.").
			Default("tls12").
			Advanced(),
	).
		Description("The certificates for `wss://`; without them, clients connect over `ws://`. Changed files are reloaded when the next client connects, at most once per second; sessions stay connected. If they are invalid, an error is logged, and the previous ones stay in use.")
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

// watch loads the files, as watchFiles does. It returns nil if the listener does not use TLS.
func (s tlsSettings) watch(patience time.Duration, log *service.Logger) (*watchedFiles[*tls.Config], error) {
	if s.CertFile == "" {
		return nil, nil
	}
	paths := []string{s.CertFile, s.KeyFile}
	if s.ClientCAFile != "" {
		paths = append(paths, s.ClientCAFile)
	}
	files, err := watchFiles("TLS files", paths, filesInterval, patience, log.With("cert_file", s.CertFile), s.load)
	if err != nil {
		return nil, fmt.Errorf("field %s: %w", fieldTLS, err)
	}
	return files, nil
}

// load returns the TLS configuration with the contents of the files.
func (s tlsSettings) load(contents [][]byte) (*tls.Config, error) {
	cert, err := tls.X509KeyPair(contents[0], contents[1])
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
	if config.ClientCAs, err = certPool(s.ClientCAFile, contents[2]); err != nil {
		return nil, err
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	if s.ClientAuth == clientAuthIfGiven {
		config.ClientAuth = tls.VerifyClientCertIfGiven
	}
	// A resumed connection would bypass a change of the certificate authorities.
	config.SessionTicketsDisabled = true
	return config, nil
}

// certPool returns the certificates of a PEM file.
func certPool(path string, content []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(content) {
		return nil, fmt.Errorf("no certificate found in %s", path)
	}
	return pool, nil
}
