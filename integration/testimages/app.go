package testimages

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// AppRepo is the repository of the example application, AppTag its tag.
const (
	AppRepo = "examples/web"
	AppTag  = "1"
)

// PushApp builds the example application (the directory examples/web of this repository) and pushes its image: three
// static programs and nothing else.
func (b *Builder) PushApp(ctx context.Context, source string) error {
	im := Image{Repo: AppRepo, Tags: []string{AppTag, "latest"}, Config: ocispec.ImageConfig{
		Env: []string{pathEnv}, Entrypoint: []string{"/bin/app"}, User: "1000:1000",
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
	}}
	entries := []Entry{File("etc/passwd", "root:x:0:0::/:/\nweb:x:1000:1000::/:/\n"), File("etc/group", "root:x:0:\nweb:x:1000:\n")}
	for _, name := range []string{"app", "collector", "exporter"} {
		out := filepath.Join(b.Work, name)
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", out, "./"+name)
		cmd.Dir = source
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build %s/%s: %w: %s", source, name, err, text)
		}
		program, err := os.ReadFile(out)
		if err != nil {
			return err
		}
		entries = append(entries, Program("bin/"+name, program))
	}
	layer, err := Layer(entries...)
	if err != nil {
		return err
	}
	im.Layers = [][]byte{layer}
	_, err = b.Push(ctx, im)
	return err
}
