//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// rawCodec sends bytes as they are, in the name of the codec that everybody speaks.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = bytes.Clone(data)
	return nil
}

var _ encoding.Codec = rawCodec{}

// sendBytes calls a method with a message that no library would write.
func sendBytes(ctx context.Context, b *badInput, method string, message []byte, options ...grpc.CallOption) error {
	conn, err := grpc.NewClient(b.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	var answer []byte
	return conn.Invoke(ctx, method, &message, &answer, append(options, grpc.ForceCodec(rawCodec{}))...)
}

// in wraps a message into a field of another.
func in(number protowire.Number, message []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), message)
}

// badBytes are requests whose bytes are no message.
func badBytes() []badRequest {
	const (
		runPod = "/runtime.v1.RuntimeService/RunPodSandbox"
		create = "/runtime.v1.RuntimeService/CreateContainer"
		pull   = "/runtime.v1.ImageService/PullImage"
		list   = "/runtime.v1.RuntimeService/ListContainers"
	)
	var all []badRequest
	add := func(name string, code codes.Code, method string, message []byte, says ...string) {
		all = append(all, badRequest{"bytes: " + name, code, says, func(ctx context.Context, b *badInput) error { return sendBytes(ctx, b, method, message) }})
	}
	const wrong = codes.InvalidArgument
	for name, text := range map[string]string{
		"lone continuation": "a\x80", "cut off": "a\xe2\x82", "overlong slash": "\xc0\xaf", "surrogate": "\xed\xa0\x80", "beyond Unicode": "\xf5\x80\x80\x80", "byte 255": "\xff",
	} {
		text := []byte(text)
		add("name of a pod, UTF-8 "+name, wrong, runPod, in(1, in(1, in(1, text))), "config.metadata.name", "UTF-8")
		add("name of a container, UTF-8 "+name, wrong, create, in(2, in(1, in(1, text))), "config.metadata.name", "UTF-8")
		add("key of a label, UTF-8 "+name, wrong, runPod, in(1, in(6, append(in(1, text), in(2, []byte("v"))...))), "config.labels.key", "UTF-8")
		add("image, UTF-8 "+name, wrong, pull, in(1, in(1, text)), "image.image", "UTF-8")
	}
	add("a filter of containers that is not UTF-8", wrong, list, in(1, in(1, []byte("\xff"))), "filter.id", "UTF-8")
	add("a message that is cut off", wrong, runPod, in(1, in(1, in(1, []byte("name"))))[:5])
	add("a field of 2^63 bytes", wrong, runPod, protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.BytesType), math.MaxInt64))
	add("field number 0", wrong, runPod, []byte{0x02, 0x01, 'x'})
	add("a number without end", wrong, runPod, bytes.Repeat([]byte{0xff}, 64))
	add("an end of a group that has no beginning", wrong, runPod, []byte{0x0c})
	add("wire type 7", wrong, runPod, []byte{0x0f, 0x01})
	add("groups in groups, a million", wrong, runPod, bytes.Repeat([]byte{0x7b}, 1_000_000))
	add("text", wrong, runPod, []byte(strings.Repeat("GET / HTTP/1.1\r\n", 100)))
	add("nothing", wrong, runPod, nil, "config")
	add("fields of another time only", wrong, create, in(5000, []byte("x")), "pod_sandbox_id")
	add("a message of 17 MiB", codes.ResourceExhausted, runPod, make([]byte, 17<<20), "larger than max")
	add("unknown method", codes.Unimplemented, "/runtime.v1.RuntimeService/Destroy", nil, "Destroy")
	add("unknown service", codes.Unimplemented, "/runtime.v2.RuntimeService/Version", nil, "runtime.v2")
	add("the version before", codes.Unimplemented, "/runtime.v1alpha2.RuntimeService/Version", nil, "runtime.v1alpha2")

	raw := func(name string, send []byte) {
		all = append(all, badRequest{"connection: " + name, codes.Aborted, nil, func(ctx context.Context, b *badInput) error { return spoil(ctx, b, send) }})
	}
	raw("HTTP/1.1", []byte("GET /v1.41/containers/json HTTP/1.1\r\nHost: docker\r\n\r\n"))
	raw("zeroes", make([]byte, 1<<20))
	raw("the preface, then text", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+longText))
	raw("the preface, then a frame of 16 MiB", append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01))
	raw("a TLS hello", []byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03})
	return all
}

// spoil writes to a connection what is no gRPC and waits for the daemon to end it. That it does is told as Aborted: no
// answer has a code.
func spoil(ctx context.Context, b *badInput, send []byte) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", strings.TrimPrefix(b.Endpoint, "unix://"))
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline.Add(-5 * time.Second)); err != nil {
		return err
	}
	_, _ = conn.Write(send) // it may be cut off before the end
	if u, ok := conn.(*net.UnixConn); ok {
		_ = u.CloseWrite()
	}
	n, err := io.Copy(io.Discard, io.LimitReader(conn, 1<<20))
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("the connection stays: %w", err)
	}
	if n >= 1<<20 {
		return errors.New("the daemon answers without end")
	}
	return status.Error(codes.Aborted, "ended")
}
