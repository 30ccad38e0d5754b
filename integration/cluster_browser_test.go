//go:build integration

package integration

import (
	"bytes"
	"context"
	"fmt"
	"html"
	"image"
	"image/color"
	_ "image/png" // what the browser writes
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/berth-run/berth/integration/lab"
)

// browser opens the page by the host's name in Debian's chromium, at each node's ingress controller. What it shows is kept in bin/page-NODE.png.
func (s story) browser() {
	if _, err := exec.LookPath("chromium"); err != nil {
		s.t.Fatalf("integration/setup.sh browser installs it: %v", err)
	}
	root, err := lab.RepoRoot()
	must(s.t, err)
	nodes := map[string]string{}
	for _, p := range s.ready("web", 2, long, nil) {
		nodes[p.Metadata.Name] = p.Spec.NodeName
	}
	for _, n := range s.c.Nodes {
		picture := filepath.Join(root, "bin", "page-"+n.Name+".png")
		if err := os.Remove(picture); err != nil && !os.IsNotExist(err) {
			s.t.Fatal(err)
		}
		began := time.Now()
		document := s.browse("http://web.example/", n.Address(), picture)
		pod, err := page(document, nil)
		must(s.t, err)
		// What the pod was told of itself by the API server is what the API server says of it.
		if on := nodes[pod]; on == "" || !strings.Contains(document, "<dd>"+html.EscapeString(on)+"</dd>") {
			s.t.Errorf("by %s, it is the page of %s, which is on %q:\n%s", n.Name, pod, on, document)
		}
		must(s.t, drawn(picture))
		s.t.Logf("by %s: the page of %s in %.1f s", n.Name, pod, time.Since(began).Seconds())
	}
}

// browse opens a URL whose host is at an address: the document as it is then, and a picture of it.
func (s story) browse(url, address, picture string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	// Its sandbox refuses to be root's.
	cmd := exec.CommandContext(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--user-data-dir="+s.t.TempDir(),
		"--host-resolver-rules=MAP * "+address, "--window-size=800,450", "--screenshot="+picture, "--dump-dom", url)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with what it has started
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("chromium: %v: %s", err, errOut.Bytes())
	}
	return string(out)
}

// drawn tells that a picture is of what the page has: the panel, what is around it, and letters.
func drawn(picture string) error {
	f, err := os.Open(picture)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	im, _, err := image.Decode(f)
	if err != nil {
		return fmt.Errorf("%s: %w", picture, err)
	}
	area, seen := im.Bounds(), map[color.RGBA]int{}
	for y := area.Min.Y; y < area.Max.Y; y++ {
		for x := area.Min.X; x < area.Max.X; x++ {
			seen[color.RGBAModel.Convert(im.At(x, y)).(color.RGBA)]++
		}
	}
	around, panel := seen[color.RGBA{0x0b, 0x2a, 0x3c, 0xff}], seen[color.RGBA{0xff, 0xff, 0xff, 0xff}]
	if pixels := area.Dx() * area.Dy(); around < pixels/2 || panel < pixels/20 || len(seen) < 20 {
		return fmt.Errorf("%s: of %d pixels %d are around the page's panel and %d in it, in %d colours", picture, pixels, around, panel, len(seen))
	}
	return nil
}
