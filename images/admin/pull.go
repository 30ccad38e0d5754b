package admin

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"reflect"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images"
)

// Pull is a pull under way.
type Pull struct {
	Reference string           `json:"reference"` // normalised
	Started   time.Time        `json:"started"`
	State     images.PullState `json:"state"`
	// Fetched of Total compressed bytes are here; what was here before counts in neither.
	Fetched int64       `json:"fetchedBytes"`
	Total   int64       `json:"totalBytes"`
	Layers  []PullLayer `json:"layers"` // bottom first
}

// PullLayer is one layer of it.
type PullLayer struct {
	Digest   digest.Digest     `json:"digest"` // of the compressed blob
	State    images.LayerState `json:"state"`
	Size     int64             `json:"bytes"`
	Fetched  int64             `json:"fetchedBytes"`
	Unpacked int64             `json:"unpackedBytes"`
}

// Pulls is the answer of Pulls.
type Pulls struct {
	Pulls []Pull `json:"pulls"`
}

// Event is a line of what takes long: how far it has come, or, at last, what came of it. One field is set.
type Event struct {
	Progress *Pull  `json:"progress,omitempty"`
	Image    *Image `json:"image,omitempty"`
	Error    *Error `json:"error,omitempty"`
}

// last says that an event is the last one.
func (e *Event) last() bool { return e.Progress == nil }

// sample is how often progress is looked at while somebody watches: often enough for a bar to move.
const sample = 200 * time.Millisecond

func pullOf(p images.PullStatus) Pull {
	out := Pull{Reference: p.Reference, Started: p.Started, State: p.State, Layers: []PullLayer{}}
	out.Fetched, out.Total = p.Bytes()
	for _, l := range p.Layers {
		out.Layers = append(out.Layers, PullLayer{Digest: l.Digest, State: l.State, Size: l.Size, Fetched: l.Fetched, Unpacked: l.Unpacked})
	}
	return out
}

func (s *Server) under() *Pulls {
	all := &Pulls{Pulls: []Pull{}}
	for _, p := range s.store.Pulls() {
		all.Pulls = append(all.Pulls, pullOf(p))
	}
	return all
}

// pulls tells of all pulls, once or, with ?watch, at every change until the client goes.
func (s *Server) pulls(w http.ResponseWriter, r *http.Request) error {
	if !r.URL.Query().Has("watch") {
		reply(w, http.StatusOK, s.under())
		return nil
	}
	lines := newLines(w)
	tick := time.NewTicker(sample)
	defer tick.Stop()
	for last := (*Pulls)(nil); ; {
		if now := s.under(); !reflect.DeepEqual(now, last) {
			if lines.send(now) != nil {
				return nil
			}
			last = now
		}
		select {
		case <-r.Context().Done():
			return nil
		case <-tick.C:
		}
	}
}

// pull pulls for as long as the client stays, and tells how far it has come.
func (s *Server) pull(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Reference](w, r)
	if err != nil {
		return err
	}
	name := "" // as the store calls it; what is none, it refuses
	if named, err := reference.ParseDockerRef(req.Image); err == nil {
		name = named.String()
	}
	type result struct {
		img *images.Image
		err error
	}
	ended := make(chan result, 1)
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() {
		img, err := s.store.Pull(r.Context(), req.Image, req.Auth.credentials())
		ended <- result{img, err}
	})
	lines := newLines(w)
	tick := time.NewTicker(sample)
	defer tick.Stop()
	for last := (Pull{}); ; {
		select {
		case end := <-ended:
			if end.err != nil && last.Reference == "" {
				return end.err // nothing was said yet
			}
			if end.err != nil {
				e, _ := wire(end.err)
				_ = lines.send(Event{Error: e})
				return nil
			}
			img := s.describe(end.img, s.see())
			_ = lines.send(Event{Image: &img})
			return nil
		case <-tick.C:
		}
		for _, p := range s.store.Pulls() {
			if now := pullOf(p); now.Reference == name && !reflect.DeepEqual(now, last) {
				_ = lines.send(Event{Progress: &now}) // a client that has gone ends the pull by the request's context
				last = now
			}
		}
	}
}

// lines is an answer of a JSON value a line, each of which goes out at once.
type lines struct {
	w   http.ResponseWriter
	enc *json.Encoder
}

func newLines(w http.ResponseWriter) *lines {
	w.Header().Set("Content-Type", "application/jsonl")
	return &lines{w, json.NewEncoder(w)}
}

// stalled is how long a client may read nothing.
const stalled = time.Minute

func (l *lines) send(v any) error {
	c := http.NewResponseController(l.w)
	_ = c.SetWriteDeadline(time.Now().Add(stalled))
	return errors.Join(l.enc.Encode(v), c.Flush())
}

// Pull pulls an image. progress, if not nil, is told how far it has come.
func (c *Client) Pull(ctx context.Context, ref Reference, progress func(*Pull)) (*Image, error) {
	end, err := c.follow(ctx, http.MethodPost, "/v1/images/pull", ref, func(e *Event) {
		if progress != nil {
			progress(e.Progress)
		}
	})
	if err != nil {
		return nil, err
	}
	return end.Image, nil
}

// Pulls lists the pulls under way, those of the kubelet included.
func (c *Client) Pulls(ctx context.Context) (*Pulls, error) {
	return get[Pulls](ctx, c, http.MethodGet, "/v1/pulls", nil)
}

// WatchPulls tells of them at every change, until ctx ends or watch returns an error, which it returns.
func (c *Client) WatchPulls(ctx context.Context, watch func(*Pulls) error) error {
	resp, err := c.call(ctx, http.MethodGet, "/v1/pulls?watch", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(bufio.NewReader(resp.Body)); ; {
		var p Pulls
		if err := dec.Decode(&p); err != nil {
			return c.broken(ctx, err)
		}
		if err := watch(&p); err != nil {
			return err
		}
	}
}

// follow makes a call that is answered by events, and returns the last one, which is no error.
func (c *Client) follow(ctx context.Context, method, path string, body any, progress func(*Event)) (*Event, error) {
	resp, err := c.call(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(bufio.NewReader(resp.Body)); ; {
		e := new(Event)
		if err := dec.Decode(e); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, c.broken(ctx, err)
		}
		switch {
		case e.Error != nil:
			return nil, e.Error
		case e.last():
			return e, nil
		}
		progress(e)
	}
}
