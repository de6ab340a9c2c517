package cryo

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/redact"
)

// connectError returns the error of a connection on which no response was received, without the
// secrets that a certificate may contain: its server chooses the names and dates, and may have
// received the token in an earlier session. Other errors do not repeat texts of the server.
func connectError(err error, secrets *redact.Secrets) error {
	const unparsed = "failed to parse certificate from server"
	if failed, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return withText(err, failed.Err.Error(), verificationText(failed.Err, secrets))
	}
	if _, reason, ok := strings.Cut(err.Error(), unparsed+": "); ok && !secrets.Plain(reason) {
		return withText(err, reason, "(the reason is redacted, because it may contain a secret)")
	}
	return err
}

// withText returns an error that has a part of its text replaced.
func withText(err error, part, text string) error {
	if part == text {
		return err
	}
	return &causedError{errors.New(strings.Replace(err.Error(), part, text, 1)), err}
}

// verificationText returns the text of an error of crypto/x509, or of the application's
// verification of a certificate. Parts that may contain a secret are left out.
func verificationText(err error, secrets *redact.Secrets) string {
	wrong, isHost := errors.AsType[x509.HostnameError](err)
	invalid, isInvalid := errors.AsType[x509.CertificateInvalidError](err)
	_, isUnknown := errors.AsType[x509.UnknownAuthorityError](err)
	text := err.Error()
	switch {
	case isHost && secrets.Plain(names(wrong.Certificate)):
		return text
	case isHost:
		return fmt.Sprintf("x509: certificate is not valid for %s, and its own names are redacted, because they may contain a secret", wrong.Host)
	case isInvalid && invalid.Reason == x509.Expired && invalid.Cert != nil:
		if after := invalid.Cert.NotAfter; time.Now().After(after) {
			return "x509: certificate has expired on " + after.Format(time.DateOnly)
		}
		return "x509: certificate is not valid before " + invalid.Cert.NotBefore.Format(time.DateOnly) + ": check the clock of this system"
	case secrets.Plain(text):
		return text
	case isInvalid:
		invalid.Detail = "(redacted, because it may contain a secret)"
		return invalid.Error()
	case isUnknown:
		return x509.UnknownAuthorityError{}.Error()
	default:
		return "the reason is redacted, because it may contain a secret"
	}
}

// names returns the names of a certificate that a HostnameError may contain.
func names(cert *x509.Certificate) string {
	all := cert.DNSNames
	for _, ip := range cert.IPAddresses {
		all = append(slices.Clip(all), ip.String())
	}
	return strings.Join(all, ", ")
}
