package cluster

import (
	"archive/tar"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/integration/testimages"
)

const e2eImages = "e2e-test-images/"

// PushTestImages pushes the images of Kubernetes' end-to-end tests that the lab has not, by the names that these want. The directory is what
// build.sh has made of the target e2e.
func (c *Cluster) PushTestImages(ctx context.Context, e2e string) error {
	b, err := c.Builder()
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.Work) }()
	for _, im := range []struct {
		name string
		push func(ctx context.Context, b *testimages.Builder, e2e string) error
	}{
		{"agnhost and its pets", c.pushAgnhost},
		{"etcd", c.pushEtcd},
		{"glibc-dns-testing", pushDNSTesting},
		{"regression-issue-74839", pushRegression},
	} {
		if err := im.push(ctx, b, e2e); err != nil {
			return fmt.Errorf("image %s: %w", im.name, err)
		}
	}
	return nil
}

// pushAgnhost pushes agnhost, which most tests use, and the images that upstream makes of it by a file or two.
func (c *Cluster) pushAgnhost(ctx context.Context, b *testimages.Builder, e2e string) error {
	layers, err := c.agnhostLayers(ctx, b.Work, e2e)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(e2e, "VERSION"))
	if err != nil {
		return err
	}
	version := strings.TrimSpace(string(text))
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/busybox"}
	config := ocispec.ImageConfig{Env: env, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}
	if _, err := b.Push(ctx, testimages.Image{Repo: e2eImages + "agnhost", Tags: []string{version, "latest"}, Layers: layers, Config: config}); err != nil {
		return err
	}
	// Tests replace the image of a pod by this one, or the other way. It is the same program, but not the same image.
	config.Labels = map[string]string{"previous-to": version}
	if _, err := b.Push(ctx, testimages.Image{Repo: e2eImages + "agnhost", Tags: []string{"2.55"}, Layers: layers, Config: config}); err != nil {
		return err
	}
	for _, pet := range []string{"kitten", "nautilus"} {
		files, err := filesOf(filepath.Join(e2e, "images", pet))
		if err != nil {
			return err
		}
		if _, err := b.Push(ctx, testimages.Image{
			Repo: e2eImages + pet, Tags: []string{"1.8"}, Layers: append(layers[:len(layers):len(layers)], files),
			Config: ocispec.ImageConfig{Env: env, Entrypoint: []string{"/agnhost"}, Cmd: []string{"test-webserver"}},
		}); err != nil {
			return err
		}
	}
	return nil
}

// filesOf is a layer of the files of a directory.
func filesOf(dir string) ([]byte, error) {
	var entries []testimages.Entry
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(filepath.Join(dir, name))
		entries = append(entries, testimages.File(name, string(text)))
		return err
	})
	if err != nil {
		return nil, err
	}
	return testimages.Layer(entries...)
}

// pushEtcd pushes the cluster's own etcd.
func (c *Cluster) pushEtcd(ctx context.Context, b *testimages.Builder, _ string) error {
	return pushProgram(ctx, b, "etcd", "3.7.0-0", c.program("etcd"), "usr/local/bin/etcd")
}

func pushRegression(ctx context.Context, b *testimages.Builder, e2e string) error {
	const name = "regression-issue-74839"
	return pushProgram(ctx, b, e2eImages+name, "1.5", filepath.Join(e2e, name), name)
}

// PushSampleAPIServer pushes the API server that tests of aggregation run.
func (c *Cluster) PushSampleAPIServer(ctx context.Context, program string) error {
	b, err := c.Builder()
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.Work) }()
	return pushProgram(ctx, b, e2eImages+"sample-apiserver", "1.29.2", program, "sample-apiserver")
}

// pushProgram pushes an image that has one program.
func pushProgram(ctx context.Context, b *testimages.Builder, repo, tag, program, as string) error {
	text, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	layer, err := testimages.Layer(testimages.Program(as, text), testimages.Entry{Name: "tmp", Type: tar.TypeDir, Mode: 0o777 | fs.ModeSticky})
	if err != nil {
		return err
	}
	_, err = b.Push(ctx, testimages.Image{
		Repo: repo, Tags: []string{tag}, Layers: [][]byte{layer}, Config: ocispec.ImageConfig{Entrypoint: []string{"/" + as}},
	})
	return err
}

// pushDNSTesting pushes the image whose names are looked up by glibc and by Debian's dig.
func pushDNSTesting(ctx context.Context, b *testimages.Builder, e2e string) error {
	layer, err := debianLayer(ctx, b.Work, filepath.Dir(e2e), "glibc-dns-testing", []string{"base-files", "dash", "coreutils", "libc-bin", "bind9-dnsutils"})
	if err != nil {
		return err
	}
	// Debian writes it when packages are set up, which nobody does here.
	names, err := testimages.Layer(testimages.File("etc/nsswitch.conf", "hosts: files dns\n"))
	if err != nil {
		return err
	}
	_, err = b.Push(ctx, testimages.Image{
		Repo: e2eImages + "glibc-dns-testing", Tags: []string{"2.1.1"}, Layers: [][]byte{layer, names},
		Config: ocispec.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"sh"}},
	})
	return err
}
