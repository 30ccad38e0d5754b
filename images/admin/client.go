package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"

	"github.com/berth-run/berth/images"
)

// Client asks a daemon.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient makes a client of the daemon that listens on a socket.
func NewClient(socket string) *Client {
	var d net.Dialer
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
		DisableKeepAlives: true, // a tool asks once
	}}}
}

// Images lists all images, ordered by id.
func (c *Client) Images(ctx context.Context) (*List, error) {
	return get[List](ctx, c, http.MethodGet, "/v1/images", nil)
}

// Inspect tells all about the image that a name means: a reference, an id or a prefix of one.
func (c *Client) Inspect(ctx context.Context, name string) (*Detail, error) {
	return get[Detail](ctx, c, http.MethodPost, "/v1/images/inspect", Names{Names: []string{name}})
}

// Remove removes images, and tells of each what became of it. With force those that are pinned or in use go, too.
func (c *Client) Remove(ctx context.Context, force bool, names ...string) (*Removal, error) {
	return get[Removal](ctx, c, http.MethodPost, "/v1/images/remove", Names{Names: names, Force: force})
}

// Pin has the kubelet told that it must not remove images, or that it may, and tells of each what became of it.
func (c *Client) Pin(ctx context.Context, pinned bool, names ...string) (*Pinned, error) {
	return get[Pinned](ctx, c, http.MethodPost, "/v1/images/pin", Pins{Names: names, Pinned: pinned})
}

// Usage tells what takes how much of the disk.
func (c *Client) Usage(ctx context.Context) (*Usage, error) {
	return get[Usage](ctx, c, http.MethodGet, "/v1/images/du", nil)
}

// Explain has the daemon ask the hosts that a pull would ask.
func (c *Client) Explain(ctx context.Context, ref Reference) (*images.Explanation, error) {
	return get[images.Explanation](ctx, c, http.MethodPost, "/v1/registry", ref)
}

// get is a call with one answer.
func get[T any](ctx context.Context, c *Client, method, path string, body any) (*T, error) {
	resp, err := c.call(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out := new(T)
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return nil, c.broken(ctx, err)
	}
	return out, nil
}

// call makes a call. A body that is a reader is sent as it is, anything else as JSON. The answer is one of success.
func (c *Client) call(ctx context.Context, method, path string, body any) (*http.Response, error) {
	r, raw := body.(io.Reader)
	if !raw && body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://berth"+path, r)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	e := new(Error)
	if json.NewDecoder(resp.Body).Decode(e) != nil || e.Text == "" {
		return nil, fmt.Errorf("the daemon at %s answers %s: is it of another version?", c.socket, resp.Status)
	}
	return nil, e
}

// broken is the error of a call that got no answer, or half of one.
func (c *Client) broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // its URL is ours, and says nothing
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("the daemon's socket is for root alone: %s: %w", c.socket, err)
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return fmt.Errorf("no daemon answers: is berth serve running? tried %s (another one: --run, --address): %w", c.socket, op.Err)
	}
	return fmt.Errorf("the daemon at %s broke off, see its log: %w", c.socket, err)
}
