package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// transferError marks what went wrong between an origin and here, as opposed to with the content or the disk.
type transferError struct{ err error }

func (e *transferError) Error() string { return e.err.Error() }
func (e *transferError) Unwrap() error { return e.err }

// errContent says that bytes are not those that a digest promised.
var errContent = errors.New("content is not what its digest says")

const fetchTries = 3

// blob fetches what desc names and hands it to consume while it is verified. consume must read to the end, and begin
// anew each time: after bytes that are not what their digest promised, another mirror is asked for all of them.
func (src *source) blob(ctx context.Context, desc ocispec.Descriptor, limit int64, consume func(io.Reader) error) error {
	// Foreign layers name URLs that any image author chooses: fetching them would let an image reach what only this
	// node reaches. Data is a copy that would have to be verified as well.
	desc.URLs, desc.Data, desc.Annotations = nil, nil, nil
	if err := checkDescriptor(desc, max(limit, 1)); err != nil {
		return err
	}
	for try := 1; ; try++ {
		d := src.download(ctx, desc, limit)
		err := d.into(consume)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, errSpace) || isFull(err) {
			return err // whatever host there is
		}
		for _, host := range d.hosts {
			src.fault(host, err.Error())
		}
		if try == fetchTries || !errors.Is(err, errContent) && !errors.Is(err, errRange) {
			return err
		}
		// The only registry has other bytes: it will not have better ones in a second, unless they were pieced together.
		if !src.leaveOut(d.hosts...) && (d.connections < 2 || errors.Is(err, errShort)) {
			return err
		}
	}
}

// fetchDocument fetches a small document whole.
func fetchDocument(ctx context.Context, from origin, desc ocispec.Descriptor) ([]byte, error) {
	var buf bytes.Buffer
	err := from.blob(ctx, desc, maxDocument, func(r io.Reader) error {
		buf.Reset()
		_, err := io.Copy(&buf, r)
		return err
	})
	return buf.Bytes(), err
}

// checkDigest says whether bytes that were hashed are those that a digest names.
func checkDigest(want digest.Digest, h hash.Hash) error {
	if got := digest.NewDigest(want.Algorithm(), h); got != want {
		return fmt.Errorf("%s: the digest of what came is %s: %w", want, got, errContent)
	}
	return nil
}

// verifier passes bytes on while it counts and hashes them; its EOF means that they are those that the descriptor names.
type verifier struct {
	r     io.Reader
	desc  ocispec.Descriptor
	hash  hash.Hash
	n     int64
	ended bool
}

// Read implements io.Reader.
func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.hash.Write(p[:n])
	v.n += int64(n)
	if v.n > v.desc.Size {
		return 0, fmt.Errorf("%s: longer than %d bytes: %w", v.desc.Digest, v.desc.Size, errContent)
	}
	switch {
	case err == io.EOF:
		if v.n != v.desc.Size {
			return n, fmt.Errorf("%s: %d bytes instead of %d: %w", v.desc.Digest, v.n, v.desc.Size, errContent)
		}
		if err := checkDigest(v.desc.Digest, v.hash); err != nil {
			return n, err
		}
		v.ended = true
	case err != nil:
		err = &transferError{err}
	}
	return n, err
}
