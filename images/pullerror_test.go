package images

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// What this node's own disk does is not the registry's: the kubelet would be told the wrong reason, and a local image be
// taken instead.
func TestErrorsOfTheDiskAreNotTheRegistrys(t *testing.T) {
	named, err := parseReference("registry.example/a:b")
	if err != nil {
		t.Fatal(err)
	}
	p := &pull{named: named, src: &layoutOrigin{}}
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", unix.ECONNREFUSED)}
	for _, c := range []struct {
		err         error
		unavailable bool
	}{
		{&os.PathError{Op: "mkdir", Path: "/", Err: unix.ENOSPC}, false},
		{&os.PathError{Op: "syncfs", Path: "/", Err: unix.EIO}, false},
		{&os.LinkError{Op: "rename", Old: "/a", New: "/b", Err: unix.EXDEV}, false},
		{fmt.Errorf("layer 1: %w", unix.EROFS), false},
		{fmt.Errorf("manifest: %w", refused), true},
		{&net.DNSError{Err: "no such host", Name: "registry.example"}, true},
		{&transferError{unix.ECONNRESET}, true},
	} {
		if got := errors.Is(p.explain(context.Background(), c.err), ErrRegistryUnavailable); got != c.unavailable {
			t.Errorf("%v: unavailable %v", c.err, got)
		}
		if got := errdefs.IsResourceExhausted(p.explain(context.Background(), c.err)); got != errors.Is(c.err, unix.ENOSPC) {
			t.Errorf("%v: exhausted %v", c.err, got)
		}
	}
}
