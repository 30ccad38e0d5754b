package images

import (
	"cmp"
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
)

// secrets are what one pull proves with who asks. Registries repeat in their answers what they were sent, in any form that
// it has on its way; nothing of it may be told.
type secrets struct {
	mu    sync.Mutex
	texts []string // the longest first
}

// shortSecret is the length from which on a text is taken for a secret: shorter ones would be found everywhere.
const shortSecret = 4

// cutSecret is how much of a secret must stand before the end of a text that was cut off.
const cutSecret = 8

func (s *secrets) addCredentials(c credentials) {
	s.add(c.secret, c.bearer)
	if c.secret == "" {
		return
	}
	for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		s.add(encoding.EncodeToString([]byte(c.username+":"+c.secret)), encoding.EncodeToString([]byte(c.secret)))
	}
}

// addHeaders adds values, and what stands in them after a scheme such as Bearer.
func (s *secrets) addHeaders(values ...string) {
	for _, v := range values {
		_, after, _ := strings.Cut(v, " ")
		s.add(v, after)
	}
}

// add adds texts as they are, and as they stand in URLs and between quotation marks.
func (s *secrets) add(texts ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, text := range texts {
		for _, form := range []string{text, url.QueryEscape(text), url.PathEscape(text), unquoted(text)} {
			if len(form) >= shortSecret && !slices.Contains(s.texts, form) {
				s.texts = append(s.texts, form)
			}
		}
	}
	slices.SortFunc(s.texts, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
}

// redact returns a text without them, and without the beginning of one where quote cut it.
func (s *secrets) redact(text string) string {
	const redacted = "REDACTED"
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, secret := range s.texts {
		text = strings.ReplaceAll(text, secret, redacted)
	}
	pieces := strings.Split(text, cutMark)
	for i, piece := range pieces[:len(pieces)-1] {
		for _, secret := range s.texts {
			pieces[i] = withoutBeginning(piece, secret, redacted)
			if pieces[i] != piece {
				break
			}
		}
	}
	return strings.Join(pieces, cutMark)
}

// withoutBeginning returns text without the beginning of secret that it ends with, if that is long enough to be one.
func withoutBeginning(text, secret, instead string) string {
	for n := min(len(secret), len(text)); n >= cutSecret; n-- {
		if strings.HasSuffix(text, secret[:n]) {
			return text[:len(text)-n] + instead
		}
	}
	return text
}

// redactAnswer takes them out of what containerd's library tells of an answer.
func (s *secrets) redactAnswer(resp *http.Response) {
	resp.Status = unquoted(s.redact(resp.Status))
}
