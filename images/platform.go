package images

import (
	"strconv"
	"sync"

	"github.com/containerd/platforms"
	"github.com/klauspost/cpuid/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// nodePlatform is what images are chosen for. containerd's library knows the variants of ARM only; of x86-64 there are
// four levels, and an image may be there for some of them, or only for a higher one than the first.
var nodePlatform = sync.OnceValue(func() ocispec.Platform {
	p := platforms.DefaultSpec()
	if level := cpuid.CPU.X64Level(); p.Architecture == "amd64" && level > 1 {
		p.Variant = "v" + strconv.Itoa(level)
	}
	return p
})
