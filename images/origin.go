package images

import (
	"context"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// origin is where an image comes from: the registries of its reference, or an archive.
type origin interface {
	// resolve tells what the reference means there.
	resolve(ctx context.Context) (ocispec.Descriptor, error)
	// blob hands the bytes that desc names to consume while they are verified: its end of file means that they are right.
	// consume must read to the end, and begin anew each time.
	blob(ctx context.Context, desc ocispec.Descriptor, limit int64, consume func(io.Reader) error) error
	// layers returns what to fetch for the layers of a manifest, whose configuration has the diff IDs.
	layers(descs []ocispec.Descriptor, diffIDs []digest.Digest) []ocispec.Descriptor
	// allNotes is what an error should be told with.
	allNotes() []string
	// redact takes out of a text what nobody may be told.
	redact(text string) string
	close()
}

// layers implements origin.
func (src *source) layers(descs []ocispec.Descriptor, _ []digest.Digest) []ocispec.Descriptor {
	return descs
}

// redact implements origin.
func (src *source) redact(text string) string {
	return src.secrets.redact(queries.ReplaceAllString(text, "$1?…")) // signed URLs open doors, too
}

// resolve implements origin.
func (src *source) resolve(ctx context.Context) (ocispec.Descriptor, error) {
	_, desc, err := src.resolver.Resolve(context.WithValue(quietly(ctx), limitKey{}, int64(maxDocument)), src.named.String())
	if errdefs.IsNotImplemented(err) {
		_, err = parseDocument(nil, dockerSchema1) // the one format that the resolver knows and does not take
	}
	return desc, err
}
