package images

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"slices"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// download is a blob as one stream of bytes, over as many connections as it takes. One that breaks off is taken up where
// it was by a range, at the next mirror if there is one; a registry that ignores ranges sends the beginning once more,
// which is skipped. There is no If-Range: the digest over all that came says whether the pieces belong together. Its EOF
// means that the bytes are those that the descriptor names.
type download struct {
	src     *source
	ctx     context.Context
	cancel  context.CancelFunc
	desc    ocispec.Descriptor
	fetcher remotes.Fetcher
	who     *served
	meter   *meter

	body        io.ReadCloser
	hash        hash.Hash
	at          int64
	brought     int64 // by this connection
	connections int
	failed      int      // connections in a row that brought next to nothing
	hosts       []string // who sent something
	err         error    // once there is nothing more to read
}

// worthwhile is how much a connection has to bring for its end not to count as a failure.
const worthwhile = 32 << 10

// errShort says that an answer ended before the blob did.
var errShort = errors.New("the answer is too short")

func (src *source) download(ctx context.Context, desc ocispec.Descriptor, limit int64) *download {
	d := &download{src: src, desc: desc, who: &served{}, meter: &meter{}, hash: desc.Digest.Algorithm().Hash()}
	d.ctx, d.cancel = context.WithCancel(quietly(ctx))
	d.ctx = context.WithValue(context.WithValue(context.WithValue(d.ctx, limitKey{}, limit), servedKey{}, d.who), meterKey{}, d.meter)
	return d
}

// into hands the stream to consume, and ends it.
func (d *download) into(consume func(io.Reader) error) error {
	defer d.hangUp()
	defer d.cancel()
	err := consume(d)
	if err == nil && d.err != io.EOF {
		return fmt.Errorf("%s was not read to its end", d.desc.Digest)
	}
	return err
}

// Close makes a Read under way, and all others, return soon.
func (d *download) Close() error {
	d.cancel()
	return nil
}

// Read implements io.Reader.
func (d *download) Read(p []byte) (int, error) {
	for d.err == nil {
		n, err := d.piece(p)
		d.hash.Write(p[:n])
		d.at += int64(n)
		d.brought += int64(n)
		switch {
		case err == nil:
			return n, nil
		case d.ctx.Err() != nil:
			d.err = context.Cause(d.ctx)
		case err == io.EOF && d.at == d.desc.Size:
			if d.err = checkDigest(d.desc.Digest, d.hash); d.err == nil {
				d.err = io.EOF
			}
		case errdefs.IsFailedPrecondition(err), d.at > d.desc.Size:
			// containerd's reader noticed that there is more than the descriptor says.
			d.err = fmt.Errorf("%s: longer than %d bytes: %w", d.desc.Digest, d.desc.Size, errContent)
		default:
			if status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); err == io.EOF || ok && status.StatusCode == http.StatusRequestedRangeNotSatisfiable {
				err = fmt.Errorf("%s: %w: it ends after %d of %d bytes: %w", d.desc.Digest, errShort, d.at, d.desc.Size, errContent)
			}
			d.err = d.again(err)
		}
		if n > 0 {
			return n, nil // the error, if there is one, is told by the next call
		}
	}
	return 0, d.err
}

// piece reads from the connection there is, or makes one.
func (d *download) piece(p []byte) (int, error) {
	if d.body == nil {
		var err error
		// Each time anew, since mirrors may have been left out.
		if d.fetcher, err = d.src.blobs.Fetcher(d.ctx, d.src.named.String()); err != nil {
			return 0, err
		}
		body, err := d.fetcher.Fetch(d.ctx, d.desc)
		if err != nil {
			return 0, err
		}
		if seeker, ok := body.(io.Seeker); ok {
			_, err = seeker.Seek(d.at, io.SeekStart)
		} else if d.at > 0 {
			err = errdefs.ErrNotImplemented
		}
		if err != nil {
			body.Close()
			return 0, err
		}
		d.body = body
		d.brought = 0
		d.connections++
	}
	n, err := d.body.Read(p)
	if host := d.who.get(); n > 0 && !slices.Contains(d.hosts, host) {
		d.hosts = append(d.hosts, host)
	}
	d.src.track.bytes.Add(uint64(n))
	return n, err
}

// again says whether another connection should be tried: nil, once it is time for it, or the error to be told.
func (d *download) again(err error) error {
	d.hangUp()
	if !passing(err) || errors.Is(err, errShort) && d.brought == 0 {
		return &transferError{err} // where two answers end at the same byte there is no more
	}
	if d.brought >= min(worthwhile, d.src.pace.Floor) {
		d.failed = 0
	}
	d.failed++
	d.brought = 0
	switch {
	case d.src.leaveOut(d.who.get()):
	case errors.Is(err, errRange):
		return &transferError{err} // of the only registry: from its beginning, if at all
	case d.failed == tries:
		return &transferError{err}
	case d.failed > 1:
		wait := d.src.pace.backOff(d.failed - 1)
		d.meter.waited += wait
		if err := sleep(d.ctx, wait); err != nil {
			return err
		}
	}
	if d.at > 0 {
		d.src.track.resumed.Add(1)
	}
	return nil
}

// passing tells what may be better with the next connection from what a registry means, and from what was waited for
// already.
func passing(err error) bool {
	_, refused := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	_, busy := errors.AsType[*busyError](err)
	return !refused && !busy && !errors.Is(err, docker.ErrInvalidAuthorization) && !errors.Is(err, errRedirect) &&
		!errors.Is(err, errTooLong) && !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err)
}

func (d *download) hangUp() {
	if d.body != nil {
		d.body.Close()
		d.body = nil
	}
}
