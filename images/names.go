package images

import (
	"crypto"
	_ "crypto/sha512" // sha384 and sha512 digests: go-digest calls them unsupported unless they are linked in
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

var _ = crypto.SHA512

var (
	hexPattern = regexp.MustCompile(`^[0-9a-f]{1,128}$`)
	idPattern  = regexp.MustCompile(`^(sha256|sha384|sha512):[0-9a-f]{1,128}$`)
	fullHex    = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// parseReference normalises a reference as Docker does: docker.io and library/ are added where they are left out, and
// :latest where there is neither tag nor digest. Of a tag and a digest the digest decides, and the tag is dropped.
func parseReference(name string) (reference.Named, error) {
	if name == "" {
		return nil, fmt.Errorf("image reference is empty: %w", errdefs.ErrInvalidArgument)
	}
	if idPattern.MatchString(name) || fullHex.MatchString(name) {
		return nil, fmt.Errorf("image reference %q is an image id; a repository is needed: %w", name, errdefs.ErrInvalidArgument)
	}
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, fmt.Errorf("image reference %s: %w: %w", quote(name), err, errdefs.ErrInvalidArgument)
	}
	if d, ok := named.(reference.Digested); ok {
		if err := d.Digest().Validate(); err != nil {
			return nil, fmt.Errorf("image reference %s: %w: %w", quote(name), err, errdefs.ErrInvalidArgument)
		}
	}
	return named, nil
}

// quote shows foreign text in errors and logs, bounded and without control characters.
func quote(s string) string {
	if len(s) > 300 {
		s = s[:300] + cutMark
	}
	return fmt.Sprintf("%q", s)
}

// cutMark ends what quote has cut off.
const cutMark = "…"

// unquoted is what quote has between its quotation marks.
func unquoted(s string) string {
	s = quote(s)
	return s[1 : len(s)-1]
}

// find returns the id of the image that a name means: a reference, an id, or a prefix of one id, with or without its
// algorithm. References win over prefixes, so that an image called "cafe" is not shadowed by an id; full ids win over
// references, which cannot look like them.
func (s *Store) find(name string) (digest.Digest, error) {
	notFound := func() (digest.Digest, error) {
		return "", fmt.Errorf("image %s: %w", quote(name), errdefs.ErrNotFound)
	}
	if name == "" {
		return "", fmt.Errorf("image name is empty: %w", errdefs.ErrInvalidArgument)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	id := name
	if fullHex.MatchString(name) {
		id = "sha256:" + name
	}
	if s.images[digest.Digest(id)] != nil {
		return digest.Digest(id), nil
	}
	named, err := reference.ParseDockerRef(name)
	if err == nil && !idPattern.MatchString(name) {
		if id, ok := s.refs[named.String()]; ok {
			return id, nil
		}
	}
	if !hexPattern.MatchString(name) && !idPattern.MatchString(name) {
		if err != nil {
			return "", fmt.Errorf("image name %s: %w: %w", quote(name), err, errdefs.ErrInvalidArgument)
		}
		return notFound()
	}
	var found []digest.Digest
	for id := range s.images {
		if strings.HasPrefix(string(id), name) || strings.HasPrefix(id.Encoded(), name) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 0:
		return notFound()
	case 1:
		return found[0], nil
	}
	slices.Sort(found)
	return "", fmt.Errorf("image id prefix %s is ambiguous: %s and %s begin with it: %w", quote(name), found[0], found[1], errdefs.ErrInvalidArgument)
}
