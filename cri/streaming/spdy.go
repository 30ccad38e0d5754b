package streaming

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/berth-run/berth/cri/pods"
)

// remoteSPDY serves Exec and Attach.
func (s *sessions) remoteSPDY(w http.ResponseWriter, r *http.Request, req request) {
	protocol, err := httpstream.Handshake(r, w, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return // the client has been told
	}
	opened := newOpening(req.asked, protocol)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(guardedWriter{ResponseWriter: w, streams: maxRemoteStreams}, r, opened.stream)
	if conn == nil {
		return
	}
	defer conn.Close()
	conn.SetIdleTimeout(s.idle)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() {
		select {
		case <-conn.CloseChan():
			cancel() // the client has gone
		case <-ctx.Done():
		}
	})
	defer cancel()
	if err := opened.wait(ctx); err != nil {
		s.log.Info("streaming session did not begin", "kind", req.kind, "id", req.id, "error", err)
		return
	}

	st := pods.Streams{TTY: req.tty}
	if in := opened.streams[remotecommand.StreamTypeStdin]; in != nil {
		st.Stdin = in
	}
	if out := opened.streams[remotecommand.StreamTypeStdout]; out != nil {
		st.Stdout = out
	}
	if out := opened.streams[remotecommand.StreamTypeStderr]; out != nil {
		st.Stderr = out
	}
	if in := opened.streams[remotecommand.StreamTypeResize]; in != nil {
		sizes := make(chan pods.TerminalSize)
		st.Resize = sizes
		all.Go(func() { decodeSizes(ctx, in, sizes) })
		defer in.Reset() //nolint:errcheck // the connection is closed next
	}
	err = s.run(ctx, req, st)
	failure := opened.streams[remotecommand.StreamTypeError]
	_, _ = failure.Write(statusOf(err).text(protocol == remotecommand.StreamProtocolV4Name))
	for _, kind := range []string{remotecommand.StreamTypeStdout, remotecommand.StreamTypeStderr, remotecommand.StreamTypeError} {
		if out := opened.streams[kind]; out != nil {
			_ = out.Close()
		}
	}
}

// opening collects the streams that a client opens at the beginning of an exec or attach.
type opening struct {
	whole chan struct{} // all are there

	mu      sync.Mutex
	missing map[string]bool
	streams map[string]httpstream.Stream
	replied []<-chan struct{}
}

func newOpening(a asked, protocol string) *opening {
	o := &opening{whole: make(chan struct{}), missing: map[string]bool{remotecommand.StreamTypeError: true}, streams: map[string]httpstream.Stream{}}
	resizes := protocol == remotecommand.StreamProtocolV4Name || protocol == remotecommand.StreamProtocolV3Name
	for kind, wanted := range map[string]bool{
		remotecommand.StreamTypeStdin:  a.stdin,
		remotecommand.StreamTypeStdout: a.stdout,
		remotecommand.StreamTypeStderr: a.stderr && !a.tty, // one terminal, one stream
		remotecommand.StreamTypeResize: a.tty && resizes,
	} {
		if wanted {
			o.missing[kind] = true
		}
	}
	return o
}

// stream takes a stream; an error refuses it.
func (o *opening) stream(stream httpstream.Stream, replied <-chan struct{}) error {
	kind := stream.Headers().Get(remotecommand.StreamType)
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.missing[kind] {
		return fmt.Errorf("header %s: %.20q: no such stream was asked for, or it is there already", remotecommand.StreamType, kind)
	}
	delete(o.missing, kind)
	o.streams[kind] = stream
	o.replied = append(o.replied, replied)
	if len(o.missing) == 0 {
		close(o.whole)
	}
	return nil
}

// wait returns when all streams are there, and their client knows it: what is sent before would be lost.
func (o *opening) wait(ctx context.Context) error {
	late := time.NewTimer(remotecommand.DefaultStreamCreationTimeout)
	defer late.Stop()
	select {
	case <-o.whole:
	case <-ctx.Done():
		return ctx.Err()
	case <-late.C:
		return fmt.Errorf("the client has not opened its streams within %s", remotecommand.DefaultStreamCreationTimeout)
	}
	for _, replied := range o.replied { // complete, and written no more
		select {
		case <-replied:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// decodeSizes passes on the sizes of a terminal. Those of 0 are what some clients send before they know.
func decodeSizes(ctx context.Context, in io.ReadCloser, out chan<- pods.TerminalSize) {
	defer close(out)
	defer in.Close()
	for d := json.NewDecoder(in); ; {
		var size remotecommand.TerminalSize
		if err := d.Decode(&size); err != nil {
			return
		}
		if size.Width == 0 || size.Height == 0 {
			continue
		}
		select {
		case out <- pods.TerminalSize(size):
		case <-ctx.Done():
			return
		}
	}
}
