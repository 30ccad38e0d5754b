package cluster

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"

	"github.com/berth-run/berth/integration/testimages"
)

// agnhostTools are the Debian packages with what upstream's image has beside agnhost, by its Dockerfile.
var agnhostTools = []string{"curl", "netcat-openbsd", "iproute2", "bash", "dash", "coreutils", "grep", "sed", "util-linux", "socat", "iperf", "bind9-dnsutils", "libc-bin", "conntrack"}

// agnhostLayers are those of Kubernetes' image agnhost. The directory is what build.sh has made of the target e2e.
func (c *Cluster) agnhostLayers(ctx context.Context, work, e2e string) ([][]byte, error) {
	tools, err := debianLayer(ctx, work, filepath.Dir(e2e), "agnhost", agnhostTools)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(filepath.Join(e2e, "agnhost"))
	if err != nil {
		return nil, err
	}
	entries := []testimages.Entry{
		testimages.Program("agnhost", program),
		{Name: "agnhost-2", Type: tar.TypeSymlink, Mode: 0o777, Link: "agnhost"},
		testimages.Dir("uploads"),
		{Name: "tmp", Type: tar.TypeDir, Mode: 0o777 | fs.ModeSticky},
		testimages.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\n"),
		testimages.File("etc/group", "root:x:0:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\nnogroup:x:65534:\n"),
		testimages.File("etc/nsswitch.conf", "hosts: files dns\n"),
		// Debian has both by its alternatives, which nobody sets up here.
		{Name: "usr/local/bin/nc", Type: tar.TypeSymlink, Mode: 0o777, Link: "/bin/nc.openbsd"},
		{Name: "bin/sh", Type: tar.TypeSymlink, Mode: 0o777, Link: "bash"},
	}
	// What upstream's has from Alpine is busybox's, wget above all. It is asked last.
	busybox, err := os.ReadFile(c.program("busybox"))
	if err != nil {
		return nil, err
	}
	applets, err := run(ctx, c.program("busybox"), "--list")
	if err != nil {
		return nil, err
	}
	entries = append(entries, testimages.Program("usr/busybox/busybox", busybox))
	for _, applet := range strings.Fields(applets) {
		if applet != "busybox" {
			entries = append(entries, testimages.Entry{Name: "usr/busybox/" + applet, Type: tar.TypeSymlink, Mode: 0o777, Link: "busybox"})
		}
	}
	for _, name := range []string{"localhost.crt", "localhost.key"} {
		text, err := os.ReadFile(filepath.Join(e2e, name))
		if err != nil {
			return nil, err
		}
		entries = append(entries, testimages.File(name, string(text)))
	}
	own, err := testimages.Layer(entries...)
	return [][]byte{tools, own}, err
}

// debianLayer makes the layer of an image with Debian's packages, or takes the one that was made before.
func debianLayer(ctx context.Context, work, cache, image string, packages []string) ([]byte, error) {
	file := filepath.Join(cache, fmt.Sprintf("%s-%x.tar", image, sha256.Sum256([]byte(strings.Join(packages, " ")))))
	layer, err := os.ReadFile(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return layer, err
	}
	if layer, err = debian(ctx, filepath.Join(work, "debian-"+image), packages); err != nil {
		return nil, err
	}
	if err := os.WriteFile(file+".part", layer, 0o644); err != nil {
		return nil, err
	}
	return layer, os.Rename(file+".part", file)
}

// debian is a layer of packages and all that they depend on, unpacked but not set up, without what only people read.
func debian(ctx context.Context, dir string, packages []string) ([]byte, error) {
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	depends := append(strings.Fields("depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances"), packages...)
	out, err := run(ctx, "apt-cache", depends...)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(out) {
		if name := strings.TrimSpace(line); name != "" && !strings.ContainsRune(" <|", rune(line[0])) {
			names = append(names, name)
		}
	}
	policy, err := run(ctx, "apt-cache", append([]string{"policy"}, names...)...)
	if err != nil {
		return nil, err
	}
	download := []string{"-q", "-o", "APT::Sandbox::User=root", "download"}
	for _, name := range names {
		// One that is only provided by others has no version itself.
		if _, after, _ := strings.Cut("\n"+policy, "\n"+name+":\n"); after != "" && !strings.HasPrefix(strings.SplitN(after, "\n", 2)[1], "  Candidate: (none)") {
			download = append(download, name)
		}
	}
	cmd := exec.CommandContext(ctx, "apt-get", download...)
	cmd.Dir = dir
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("apt-get download: %w: %s", err, text)
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	for _, deb := range debs {
		if _, err := run(ctx, "dpkg-deb", "-x", deb, root); err != nil {
			return nil, err
		}
	}
	var entries []testimages.Entry
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		name := strings.TrimPrefix(path, root+"/")
		if d.IsDir() && (name == "usr/share/doc" || name == "usr/share/man" || name == "usr/share/locale" || name == "usr/share/info") {
			return fs.SkipDir
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := testimages.Entry{Name: name, Mode: info.Mode()}
		switch {
		case info.IsDir():
			e.Type = tar.TypeDir
		case info.Mode().IsRegular():
			e.Data, err = os.ReadFile(path)
		case info.Mode()&fs.ModeSymlink != 0:
			e.Type = tar.TypeSymlink
			e.Link, err = os.Readlink(path)
		default:
			return nil
		}
		entries = append(entries, e)
		return err
	})
	if err != nil {
		return nil, err
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name < entries[j].Name })
	return testimages.Layer(entries...)
}
