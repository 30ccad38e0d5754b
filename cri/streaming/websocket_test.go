package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/berth-run/berth/cri/pods"
)

func send(t *testing.T, ws *websocket.Conn, channel byte, data string) {
	t.Helper()
	if err := websocket.Message.Send(ws, append([]byte{channel}, data...)); err != nil {
		t.Fatal(err)
	}
}

// KEP-4006: a message of 255 and a channel closes that channel alone.
func TestWebSocketV5ClosesStdin(t *testing.T) {
	s := listen(t, &fake{exec: func(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
		in, err := io.ReadAll(st.Stdin)
		if err != nil {
			return 0, err
		}
		fmt.Fprintf(st.Stdout, "got %s", in)
		fmt.Fprint(st.Stderr, "oops")
		return 7, nil
	}})
	resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"x"}, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	ws := wsDial(t, resp.GetUrl(), remotecommand.StreamProtocolV5Name)
	send(t, ws, 0, "hello, ")
	send(t, ws, 0, "world")
	send(t, ws, 255, "\x00")
	got := wsRead(ws)
	if got[1] != "got hello, world" || got[2] != "oops" || !strings.Contains(got[3], `"reason":"NonZeroExitCode"`) || !strings.Contains(got[3], `"message":"7"`) {
		t.Errorf("%q", got)
	}
}

func TestWebSocketV5Terminal(t *testing.T) {
	s := listen(t, &fake{exec: func(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
		size := <-st.Resize
		_, err := fmt.Fprintf(st.Stdout, "%t %dx%d", st.TTY, size.Width, size.Height)
		return 0, err
	}})
	resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"sh"}, Stdin: true, Stdout: true, Tty: true})
	if err != nil {
		t.Fatal(err)
	}
	ws := wsDial(t, resp.GetUrl(), remotecommand.StreamProtocolV5Name)
	send(t, ws, 4, `{"Width":0,"Height":0}`)
	send(t, ws, 4, `{"Width":80,"Height":24}`)
	if got := wsRead(ws); got[1] != "true 80x24" || !strings.Contains(got[3], "Success") {
		t.Errorf("%q", got)
	}
}

func TestWebSocketV5SessionEndsWithItsClient(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	s := listen(t, &fake{attach: func(ctx context.Context, _ string, st pods.Streams) error {
		close(began)
		<-ctx.Done()
		close(ended)
		return nil
	}})
	resp, err := s.Attach(&cri.AttachRequest{ContainerId: "abc", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	ws := wsDial(t, resp.GetUrl(), remotecommand.StreamProtocolV5Name)
	<-began
	if err := ws.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the session goes on without its client")
	}
}

func TestPortForwardTunnelledOverWebSocket(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB: more than any window
	s := listen(t, &fake{forward: func(_ context.Context, id string, port int32, stream io.ReadWriteCloser) error {
		if id != "pod" || port != 8080 {
			return errors.New("wrong pod or port")
		}
		in := make([]byte, len(big))
		if _, err := io.ReadFull(stream, in); err != nil {
			return err
		}
		_, err := stream.Write(in)
		return err
	}})
	resp, err := s.PortForward(&cri.PortForwardRequest{PodSandboxId: "pod"})
	if err != nil {
		t.Fatal(err)
	}
	ws := wsDial(t, resp.GetUrl(), tunnelProtocol)
	ws.PayloadType = websocket.BinaryFrame
	c, err := spdy.NewClientConnection(ws)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	open(t, c, "streamType", "error", "port", "8080", "requestID", "1")
	data := open(t, c, "streamType", "data", "port", "8080", "requestID", "1")
	go func() { _, _ = io.WriteString(data, big) }()
	got := make([]byte, len(big))
	if _, err := io.ReadFull(data, got); err != nil || string(got) != big {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
}

func TestUnknownTokensOverWebSocketAre404(t *testing.T) {
	s := listen(t, &fake{})
	for path, protocol := range map[string]string{"/exec/AAAAAAAA": remotecommand.StreamProtocolV5Name, "/attach/AAAAAAAA": remotecommand.StreamProtocolV5Name, "/portforward/AAAAAAAA": tunnelProtocol, "/exec/BBBBBBBB": "v4.channel.k8s.io"} {
		req, err := http.NewRequest(http.MethodGet, "http://"+s.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range map[string]string{
			"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
			"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol": protocol,
		} {
			req.Header.Set(k, v)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
}
