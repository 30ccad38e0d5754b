package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images"
)

// Imported is the answer of Import.
type Imported struct {
	Images []Image `json:"images"`
	// Error is about the next one of the archive.
	Error *Error `json:"error,omitempty"`
}

// Exported is the answer of Export, after the archive.
type Exported struct {
	*images.ExportReport
	Error *Error `json:"error,omitempty"`
}

// Media types of the two parts of an export's answer.
const (
	typeTar  = "application/x-tar"
	typeJSON = "application/json"
)

// importArchive imports what the body holds, as it comes. A body that breaks off imports nothing.
func (s *Server) importArchive(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	unpinned, err := strconv.ParseBool(q.Get("unpinned"))
	if err != nil {
		return invalid("unpinned: %q is neither true nor false", q.Get("unpinned"))
	}
	sent := &body{r: r.Body}
	imgs, err := s.store.Import(r.Context(), sent, images.ImportOptions{Names: q["name"], Unpinned: unpinned})
	if err != nil {
		if errors.Is(err, context.Canceled) && !sent.whole { // the end of a connection ends the request's context, too
			err = sent.endedEarly(err)
		}
		s.log.Warn("import failed", "error", err) // the client may have gone
		if len(imgs) == 0 {
			return err
		}
	}
	answer, layers, told := Imported{Images: []Image{}}, s.see(), map[digest.Digest]bool{}
	for _, img := range imgs { // once for each of its names
		if told[img.ID] {
			continue
		}
		told[img.ID] = true
		if now, err := s.store.Image(string(img.ID)); err == nil {
			img = now // with all its names
		}
		answer.Images = append(answer.Images, s.describe(img, layers))
	}
	if err != nil {
		answer.Error, _ = wire(err)
	}
	reply(w, http.StatusOK, answer)
	return nil
}

// body is that of a request. That it ends early is to be told as what it is.
type body struct {
	r     io.Reader
	n     int64
	whole bool // it was read to its end
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.n += int64(n)
	b.whole = err == io.EOF
	if err != nil && !b.whole {
		err = b.endedEarly(err)
	}
	return n, err
}

func (b *body) endedEarly(err error) error {
	return invalid("the body ended early, after %d bytes: %w", b.n, err)
}

// exportArchive answers with an archive, as it is made, and then with a report. What ends without a report is broken off.
func (s *Server) exportArchive(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Names](w, r)
	if err != nil {
		return err
	}
	out := &parts{w: w}
	report, err := s.store.Export(r.Context(), req.Names, out)
	if err != nil && !out.begun() {
		return err
	}
	end := Exported{ExportReport: report}
	if err != nil {
		end.Error, _ = wire(err)
	}
	out.finish(end)
	return nil
}

// parts is an answer of an archive and a report. It begins with the first byte of the archive: until then there can be an
// error instead.
type parts struct {
	w    http.ResponseWriter
	form *multipart.Writer
	tar  io.Writer
}

func (p *parts) begun() bool { return p.form != nil }

// Write implements io.Writer.
func (p *parts) Write(b []byte) (int, error) {
	if !p.begun() {
		p.form = multipart.NewWriter(p.w)
		p.w.Header().Set("Content-Type", "multipart/mixed; boundary="+p.form.Boundary())
		var err error
		if p.tar, err = p.part(typeTar); err != nil {
			return 0, err
		}
	}
	return p.tar.Write(b)
}

func (p *parts) part(kind string) (io.Writer, error) {
	return p.form.CreatePart(textproto.MIMEHeader{"Content-Type": {kind}})
}

// finish writes the report. A client that has gone does not miss it.
func (p *parts) finish(report Exported) {
	w, err := p.part(typeJSON)
	if err == nil {
		err = json.NewEncoder(w).Encode(report)
	}
	if err == nil {
		_ = p.form.Close()
	}
}

// Import has the daemon import the images of an archive: an OCI layout or a docker archive as a tar file, compressed or not.
// It returns the images that are there, also with an error, which is about the next one.
func (c *Client) Import(ctx context.Context, archive io.Reader, o images.ImportOptions) (*Imported, error) {
	q := url.Values{"unpinned": {strconv.FormatBool(o.Unpinned)}}
	if len(o.Names) > 0 {
		q["name"] = o.Names
	}
	// Not an io.Closer: the archive is the caller's to close.
	from := &readFrom{r: archive}
	in, err := get[Imported](ctx, c, http.MethodPost, "/v1/images/import?"+q.Encode(), from)
	if why := from.err.Load(); why != nil && err != nil && ctx.Err() == nil {
		if _, answered := errors.AsType[*Error](err); !answered {
			return nil, fmt.Errorf("read archive: %w", *why)
		}
	}
	if err == nil && in.Error != nil {
		return in, in.Error
	}
	return in, err
}

// Export writes images to w as a tar file that is an OCI layout and a docker archive in one. With an error what is written
// is no archive.
func (c *Client) Export(ctx context.Context, w io.Writer, names ...string) (*images.ExportReport, error) {
	resp, err := c.call(ctx, http.MethodPost, "/v1/images/export", Names{Names: names})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	form := multipart.NewReader(resp.Body, params["boundary"])
	tar, err := form.NextRawPart()
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	if err := c.copyOut(ctx, w, tar); err != nil {
		return nil, err
	}
	end, err := form.NextRawPart()
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	var report Exported
	if err := json.NewDecoder(end).Decode(&report); err != nil {
		return nil, c.broken(ctx, err)
	}
	if report.Error != nil {
		return nil, report.Error
	}
	return report.ExportReport, nil
}

// copyOut tells apart who is to blame where it fails: w, or the daemon.
func (c *Client) copyOut(ctx context.Context, w io.Writer, tar io.Reader) error {
	to := &blamed{w: w}
	if _, err := io.Copy(to, tar); err != nil {
		if to.err != nil {
			return fmt.Errorf("write archive: %w", to.err)
		}
		return c.broken(ctx, err)
	}
	return nil
}

// readFrom is an archive, of which it is kept that it could not be read.
type readFrom struct {
	r   io.Reader
	err atomic.Pointer[error]
}

// Read implements io.Reader.
func (r *readFrom) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		r.err.Store(&err)
	}
	return n, err
}

type blamed struct {
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (b *blamed) Write(p []byte) (int, error) {
	n, err := b.w.Write(p)
	b.err = err
	return n, err
}
