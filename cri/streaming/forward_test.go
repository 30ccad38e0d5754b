package streaming

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	gorilla "github.com/gorilla/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/berth-run/berth/cri/pods"
)

func forwardURL(t *testing.T, s *Server, ports ...int32) string {
	t.Helper()
	resp, err := s.PortForward(&cri.PortForwardRequest{PodSandboxId: "pod", Port: ports})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetUrl()
}

// A refused connection is told each time, whichever stream came first.
func TestRefusedForwardsAreToldOnTheErrorStream(t *testing.T) {
	s := listen(t, &fake{forward: func(context.Context, string, int32, io.ReadWriteCloser) error {
		return errors.New("connection refused")
	}})
	c := dial(t, forwardURL(t, s), "portforward.k8s.io")
	for i := range 100 {
		kinds := []string{"error", "data"}
		if i%2 == 1 {
			kinds[0], kinds[1] = kinds[1], kinds[0]
		}
		streams := map[string]httpstream.Stream{}
		for _, kind := range kinds {
			streams[kind] = open(t, c, "streamType", kind, "port", "81", "requestID", fmt.Sprint(i))
		}
		said, err := io.ReadAll(streams["error"])
		if err != nil || !strings.Contains(string(said), "port 81 cannot be forwarded: connection refused") {
			t.Fatalf("%d: error stream: %q %v", i, said, err)
		}
		if data, _ := io.ReadAll(streams["data"]); len(data) != 0 {
			t.Fatalf("%d: data: %q", i, data)
		}
	}
}

// A client that gives a stream up, as kubectl does when its own client has gone, ends that connection alone.
func TestForwardEndsWhenItsStreamIsReset(t *testing.T) {
	ended := make(chan int32, 2)
	s := listen(t, &fake{forward: func(ctx context.Context, _ string, port int32, stream io.ReadWriteCloser) error {
		if port == 81 {
			_, err := io.Copy(stream, stream)
			return err
		}
		_, _ = io.Copy(io.Discard, stream)
		<-ctx.Done()
		ended <- port
		return ctx.Err()
	}})
	c := dial(t, forwardURL(t, s), "portforward.k8s.io")
	streams := map[string]httpstream.Stream{}
	for _, port := range []string{"80", "81"} {
		open(t, c, "streamType", "error", "port", port, "requestID", port)
		streams[port] = open(t, c, "streamType", "data", "port", port, "requestID", port)
	}
	if err := streams["80"].Reset(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Error("the connection goes on")
	}
	if _, err := io.WriteString(streams["81"], "hello"); err != nil {
		t.Fatal(err)
	}
	_ = streams["81"].Close()
	if got, err := io.ReadAll(streams["81"]); err != nil || string(got) != "hello" {
		t.Errorf("the other: %q %v", got, err)
	}
}

// Old clients name no request: their streams follow each other.
func TestForwardsOfClientsThatNameNoRequest(t *testing.T) {
	s := listen(t, &fake{forward: func(_ context.Context, _ string, port int32, stream io.ReadWriteCloser) error {
		_, err := fmt.Fprint(stream, port)
		return err
	}})
	c := dial(t, forwardURL(t, s), "portforward.k8s.io")
	for _, port := range []string{"80", "65535"} {
		open(t, c, "streamType", "error", "port", port)
		if got, err := io.ReadAll(open(t, c, "streamType", "data", "port", port)); err != nil || string(got) != port {
			t.Errorf("port %s: %q %v", port, got, err)
		}
	}
}

// headed is a stream of which only its headers are looked at.
type headed struct {
	httpstream.Stream
	kind, port, id string
}

func (h headed) Headers() http.Header {
	out := http.Header{}
	for k, v := range map[string]string{"streamType": h.kind, "port": h.port, "requestID": h.id} {
		out.Set(k, v)
	}
	return out
}

// A client that opens streams without end, and pairs none, is refused those beyond a bound.
func TestStreamsThatAreRefused(t *testing.T) {
	f := newForwards(t.Context(), &sessions{}, "pod")
	defer func() {
		for _, p := range f.pairs {
			p.late.Stop()
		}
	}()
	replied := make(chan struct{})
	for i := range maxForwards {
		if err := f.stream(headed{kind: "error", port: "80", id: fmt.Sprint(i)}, replied); err != nil {
			t.Fatal(err)
		}
	}
	for want, h := range map[string]headed{
		"256 connections are forwarded already":  {kind: "error", port: "80", id: "more"},
		`"0" has a stream of type error already`: {kind: "error", port: "80", id: "0"},
		`"0" is outside 1..65535`:                {kind: "data", port: "0", id: "0"},
		`"65536" is outside 1..65535`:            {kind: "data", port: "65536", id: "0"},
		`"" is outside 1..65535`:                 {kind: "data", port: "", id: "0"},
		`"" is neither`:                          {kind: "", port: "80", id: "0"},
	} {
		if err := f.stream(h, replied); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", h, err, want)
		}
	}
}

// Forwarded connections that end make room for others.
func TestStreamsOfAForwardAreBounded(t *testing.T) {
	s := listen(t, &fake{forward: func(_ context.Context, _ string, port int32, stream io.ReadWriteCloser) error {
		_, err := fmt.Fprint(stream, port)
		return err
	}})
	c := dial(t, forwardURL(t, s), "portforward.k8s.io")
	for i := range maxForwards {
		open(t, c, "streamType", "error", "port", "80", "requestID", fmt.Sprint(i))
	}
	for i := range 3 * maxForwards { // those that are whole end, and make room
		id := fmt.Sprint(i)
		if i >= maxForwards {
			open(t, c, "streamType", "error", "port", "80", "requestID", id)
		}
		if got, err := io.ReadAll(open(t, c, "streamType", "data", "port", "80", "requestID", id)); err != nil || string(got) != "80" {
			t.Fatalf("%d: %q %v", i, got, err)
		}
	}
}

// The way of v4: two channels for each port, both of which begin with its number.
func TestForwardOverWebSocketChannels(t *testing.T) {
	s := listen(t, &fake{forward: func(_ context.Context, id string, port int32, stream io.ReadWriteCloser) error {
		if port == 81 {
			return errors.New("connection refused")
		}
		in := make([]byte, 5)
		if _, err := io.ReadFull(stream, in); err != nil {
			return err
		}
		_, err := fmt.Fprintf(stream, "%s got %s", id, in)
		return err
	}})
	ws := gorillaDial(t, forwardURL(t, s, 8080, 81), "v4.channel.k8s.io")
	if err := ws.WriteMessage(gorilla.BinaryMessage, []byte("\x00hello")); err != nil {
		t.Fatal(err)
	}
	got, _ := gorillaRead(ws)
	for channel, want := range map[byte]string{0: "pod got hello", 1: "", 2: "", 3: "port 81 cannot be forwarded: connection refused"} {
		port := []uint16{8080, 81}[channel/2]
		data := got[channel]
		if len(data) < 2 || binary.LittleEndian.Uint16(data) != port || string(data[2:]) != want {
			t.Errorf("channel %d: %q, want port %d and %q", channel, data, port, want)
		}
	}
}

// Connections that say nothing, or what is no request, go away by themselves and leave room for others.
func TestHalfOpenAndGarbledConnections(t *testing.T) {
	s := listen(t, &fake{exec: func(context.Context, string, []string, pods.Streams) (int, error) { return 0, nil }})
	connect := func(say string) net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if _, err := io.WriteString(c, say); err != nil {
			t.Fatal(err)
		}
		return c
	}
	token := func() string { return strings.TrimPrefix(execURL(t, s, false), "http://"+s.Addr().String()) }
	answered := []net.Conn{
		connect("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
		connect("GET " + token() + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: nonsense\r\n\r\n"),
		connect("GET " + token() + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 99\r\n\r\n"),
		connect("GET " + token() + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v99\r\n\r\n"),
	}
	// This one is upgraded, and then says what is no SPDY: it is cut.
	garbled := connect("GET " + token() + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n" + strings.Repeat("\xff", 1<<10))
	silent := []net.Conn{connect(""), connect("GET /exec/slow HT")}
	for i, c := range answered {
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%d: %v", i, err)
			continue
		}
		_ = resp.Body.Close()
		if resp.StatusCode < 400 || resp.StatusCode > 499 {
			t.Errorf("%d: %s", i, resp.Status)
		}
	}
	for i, c := range append(silent, garbled) {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("connection %d stays open", i)
		}
	}
	c := dial(t, execURL(t, s, false), "v4.channel.k8s.io")
	errs := open(t, c, "streamType", "error")
	open(t, c, "streamType", "stdout")
	open(t, c, "streamType", "stderr")
	if e := readExit(t, errs); e.Status != "Success" {
		t.Errorf("%+v", e)
	}
}
