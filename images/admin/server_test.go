package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/thread"
)

// node is a store that is served on a socket, with its log.
type node struct {
	*Client
	store *images.Store
	root  string
	log   *journal
}

// journal keeps a log.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.String()
}

func serve(t *testing.T, change ...func(*images.Options)) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked as root")
	}
	dir, err := os.MkdirTemp("", "berth") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	n := &node{root: filepath.Join(dir, "images"), log: &journal{}}
	log := slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	o := images.Options{Root: n.root, Log: log}
	for _, c := range change {
		c(&o)
	}
	if n.store, err = images.Open(o); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- New(Options{Store: n.store, Log: log}).Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-served, n.store.Close()); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the log:\n%s", n.log)
		}
	})
	n.Client = NewClient(socket)
	return n
}

func image(text string) *imagestest.Image {
	return imagestest.NewImage(imagestest.Layer(imagestest.File("f", text)))
}

func (n *node) mustPull(t *testing.T, ref string) *Image {
	t.Helper()
	img, err := n.Pull(t.Context(), Reference{Image: ref}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s: it did not come to be", what)
}

func TestListInspectUsageAndRemove(t *testing.T) {
	n := serve(t)
	if list, err := n.Images(t.Context()); err != nil || list.Images == nil || len(list.Images) != 0 {
		t.Fatalf("of an empty store: %+v %v", list, err)
	}
	reg := imagestest.NewRegistry(t)
	base := imagestest.Layer(imagestest.File("base", strings.Repeat("x", 100_000)))
	reg.Push("a", "v1", imagestest.NewImage(base, imagestest.Layer(imagestest.File("f", "a"))))
	reg.Push("b", "v1", imagestest.NewImage(base, imagestest.Layer(imagestest.File("f", "b"))))
	a, b := n.mustPull(t, reg.Host()+"/a:v1"), n.mustPull(t, reg.Host()+"/b:v1")
	list, err := n.Images(t.Context())
	if err != nil || len(list.Images) != 2 {
		t.Fatalf("%+v %v", list, err)
	}
	d, err := n.Inspect(t.Context(), a.ID.Encoded()[:13])
	if err != nil || d.ID != a.ID || !slices.Equal(d.RepoTags, []string{reg.Host() + "/a:v1"}) || len(d.Layers) != 2 || len(d.Containers) != 0 {
		t.Fatalf("%+v %v", d, err)
	}
	if d.Layers[0].Images != 2 || d.Layers[1].Images != 1 || d.Layers[0].Bytes < 100_000 || d.Config.OS != "linux" {
		t.Errorf("%+v", d)
	}
	if d.Unpacked != d.Layers[0].Bytes+d.Layers[1].Bytes || d.Unique != d.Layers[1].Bytes {
		t.Errorf("%d bytes, %d unique, of layers %+v", d.Unpacked, d.Unique, d.Layers)
	}
	if err := n.store.Prepare("c1", a.ID, nil); err != nil {
		t.Fatal(err)
	}
	u, err := n.Usage(t.Context())
	if err != nil || u.Layers != 3 || u.Containers != 1 || len(u.Images) != 2 {
		t.Fatalf("%+v %v", u, err)
	}
	if u.Bytes != n.store.Usage().Bytes || u.Freeable != b.Unique {
		t.Errorf("%d bytes of which %d can go; want %d and %d", u.Bytes, u.Freeable, n.store.Usage().Bytes, b.Unique)
	}

	removal, err := n.Remove(t.Context(), false, reg.Host()+"/a:v1", "no/such:image", reg.Host()+"/b:v1")
	if err != nil || len(removal.Removed) != 3 {
		t.Fatalf("%+v %v", removal, err)
	}
	if e := removal.Removed[0].Error; e == nil || !errors.Is(e, errInUse) || !strings.Contains(e.Text, "in use by container c1") || !strings.Contains(e.Text, "--force") {
		t.Errorf("of one in use: %v", e)
	}
	if e := removal.Removed[1].Error; e == nil || !errors.Is(e, errdefs.ErrNotFound) {
		t.Errorf("of one that is absent: %v", e)
	}
	if r := removal.Removed[2]; r.Error != nil || r.ID != b.ID {
		t.Errorf("of one that is free: %+v", r)
	}
	if removal, err = n.Remove(t.Context(), true, string(a.ID)); err != nil || removal.Removed[0].Error != nil {
		t.Errorf("by force: %+v %v", removal, err)
	}
	if list, err := n.Images(t.Context()); err != nil || len(list.Images) != 0 {
		t.Errorf("at last: %+v %v", list, err)
	}
	if len(n.store.Layers()) != 2 {
		t.Errorf("layers of the container: %+v", n.store.Layers())
	}
}

// A compressed layer that is kept is not free while a layer that stays has it.
func TestUsageOfABlobThatTwoLayersHave(t *testing.T) {
	n := serve(t, func(o *images.Options) { o.KeepBlobs = true })
	reg := imagestest.NewRegistry(t)
	same := imagestest.Layer(imagestest.File("f", strings.Repeat("x", 100_000)))
	reg.Push("a", "v1", imagestest.NewImage(same))
	reg.Push("b", "v1", imagestest.NewImage(imagestest.Layer(imagestest.File("below", "b")), same))
	a := n.mustPull(t, reg.Host()+"/a:v1")
	b := n.mustPull(t, reg.Host()+"/b:v1")
	d, err := n.Inspect(t.Context(), string(a.ID))
	if err != nil || len(d.Layers) != 1 || d.Layers[0].Kept == 0 || d.Unpacked != d.Layers[0].Bytes+d.Layers[0].Kept || d.Unique != d.Layers[0].Bytes {
		t.Fatalf("%+v %v", d, err)
	}
	if err := n.store.Prepare("c1", a.ID, nil); err != nil {
		t.Fatal(err)
	}
	if u, err := n.Usage(t.Context()); err != nil || u.Freeable != u.Bytes-d.Unpacked || u.Freeable == 0 {
		t.Errorf("%+v, %v; want all free but the %d bytes that the container has", u, err, d.Unpacked)
	}
	if err := n.store.Release("c1"); err != nil {
		t.Fatal(err)
	}
	if u, err := n.Usage(t.Context()); err != nil || u.Freeable != u.Bytes || u.Bytes >= a.Unpacked+b.Unpacked {
		t.Errorf("%+v, %v; want all free, and less than %d + %d bytes", u, err, a.Unpacked, b.Unpacked)
	}
}

// A pause image, which every other runtime on the node needs, is pinned.
func TestPinnedImagesAreNotRemoved(t *testing.T) {
	n := serve(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("pause", "3.10", image("p"))
	img := n.mustPull(t, reg.Host()+"/pause:3.10")
	removal, err := n.Remove(t.Context(), false, string(img.ID))
	if err != nil || removal.Removed[0].Error == nil || !strings.Contains(removal.Removed[0].Error.Text, "pinned") {
		t.Errorf("%+v %v", removal, err)
	}
	if u, err := n.Usage(t.Context()); err != nil || u.Freeable != 0 {
		t.Errorf("%+v %v", u, err)
	}
}

// gated is a registry whose blobs come half, and go on when the gate is opened.
func gated(t *testing.T) (reg *imagestest.Registry, open func()) {
	reg = imagestest.NewRegistry(t)
	blob := imagestest.PlainLayer(imagestest.Tar(imagestest.File("big", strings.Repeat("x", 300_000))))
	reg.Push("big", "v1", imagestest.NewImage(blob))
	reg.Push("small", "v1", image("s"))
	gate := make(chan struct{})
	open = sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, blob.DiffID.String()) || r.Header.Get("Range") != "" {
			return false
		}
		_, _ = w.Write(blob.Blob[:100_000])
		_ = http.NewResponseController(w).Flush()
		select {
		case <-gate:
		case <-r.Context().Done():
		}
		_, _ = w.Write(blob.Blob[100_000:])
		return true
	})
	return reg, open
}

func TestCRIO1172_PullTellsHowFarItHasComeAndReadsDoNotWait(t *testing.T) {
	n := serve(t)
	reg, open := gated(t)
	ref := reg.Host() + "/big:v1"
	half := make(chan Pull, 1)
	pulled := make(chan error, 1)
	go func() {
		img, err := n.Pull(context.Background(), Reference{Image: ref}, func(p *Pull) {
			if p.Fetched == 100_000 {
				select {
				case half <- *p:
				default:
				}
			}
		})
		if err == nil && !slices.Equal(img.RepoTags, []string{ref}) {
			err = fmt.Errorf("%+v was pulled", img)
		}
		pulled <- err
	}()
	p := <-half
	if p.Reference != ref || p.State != images.PullUnpacking || len(p.Layers) != 1 || p.Total < 300_000 || p.Layers[0].State != images.LayerFetching {
		t.Errorf("half way: %+v", p)
	}
	// All else works meanwhile.
	n.mustPull(t, reg.Host()+"/small:v1")
	if list, err := n.Images(t.Context()); err != nil || len(list.Images) != 1 {
		t.Errorf("%+v %v", list, err)
	}
	if all, err := n.Pulls(t.Context()); err != nil || len(all.Pulls) != 1 || all.Pulls[0].Reference != ref {
		t.Errorf("%+v %v", all, err)
	}
	if m := scrape(t, n); !strings.Contains(m, "berth_image_pulls_in_progress 1\n") || !strings.Contains(m, `berth_image_pulls_in_progress_bytes{what="fetched"} 100000`) {
		t.Errorf("metrics:\n%s", m)
	}
	changes := make(chan int, 100)
	go func() {
		_ = n.WatchPulls(t.Context(), func(p *Pulls) error {
			changes <- len(p.Pulls)
			return nil
		})
	}()
	if first := <-changes; first != 1 {
		t.Errorf("%d pulls are watched, want one", first)
	}
	open()
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	for now := 1; now != 0; {
		now = <-changes
	}
	if _, err := n.Remove(t.Context(), false, ref); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"berth_image_pulls_in_progress 0\n", `berth_image_pulls_total{result="pulled"} 2`, `berth_image_pulls_total{result="failed"} 0`, "berth_image_pulls_local_total 0", "berth_image_store_images 1\n", "process_resident_memory_bytes"} {
		if m := scrape(t, n); !strings.Contains(m, want) {
			t.Errorf("metrics have no %q:\n%s", want, m)
		}
	}
}

func scrape(t *testing.T, n *node) string {
	t.Helper()
	resp, err := n.call(t.Context(), http.MethodGet, "/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestAClientThatGoesEndsItsPull(t *testing.T) {
	n := serve(t)
	reg, _ := gated(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := n.Pull(ctx, Reference{Image: reg.Host() + "/big:v1"}, func(p *Pull) {
		if p.Fetched > 0 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	until(t, "the pull ends", func() bool { return len(n.store.Pulls()) == 0 })
	n.nothingLeft(t)
}

// nothingLeft wants no image, no layer and no file of one in the store.
func (n *node) nothingLeft(t *testing.T) {
	t.Helper()
	if list := n.store.Images(); len(list) != 0 {
		t.Errorf("images: %+v", list)
	}
	for _, dir := range []string{"layers", "tmp", "trash"} {
		until(t, dir+" is empty", func() bool {
			left, err := os.ReadDir(filepath.Join(n.root, dir))
			return err == nil && len(left) == 0
		})
	}
}

func TestErrorsKeepTheirClassAndCredentialsStayOut(t *testing.T) {
	const secret = "s3cr3t-pass"
	n := serve(t)
	reg := imagestest.NewRegistry(t)
	reg.RequireBasic("alice", "other")
	reg.Push("a", "v1", image("x"))
	auth := &Auth{Username: "alice", Password: secret}
	for ref, class := range map[string]error{
		"UPPER:x":                errdefs.ErrInvalidArgument,
		"":                       errdefs.ErrInvalidArgument,
		reg.Host() + "/a:v1":     errdefs.ErrPermissionDenied,
		"127.0.0.1:1/nobody/a:b": images.ErrRegistryUnavailable,
	} {
		_, err := n.Pull(t.Context(), Reference{Image: ref, Auth: auth}, nil)
		if !errors.Is(err, class) || strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v, want %v", ref, err, class)
		}
	}
	reg.RequireBasic("alice", secret)
	if _, err := n.Pull(t.Context(), Reference{Image: reg.Host() + "/a:v1", Auth: auth}, nil); err != nil {
		t.Error(err)
	}
	if e, err := n.Explain(t.Context(), Reference{Image: reg.Host() + "/a:v1", Auth: auth}); err != nil || !e.Hosts[0].OK || strings.Contains(fmt.Sprintf("%+v", e), secret) {
		t.Errorf("%+v %v", e, err)
	}
	if _, err := n.Explain(t.Context(), Reference{Image: "UPPER:x"}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("%v", err)
	}
	if _, err := n.Inspect(t.Context(), "absent"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if strings.Contains(n.log.String(), secret) || strings.Contains(fmt.Sprintf("%+v", Reference{Auth: auth}), secret) {
		t.Error("the password is in the log, or would be")
	}
}

func TestAFullDiskHasAClass(t *testing.T) {
	e, status := wire(&os.PathError{Op: "write", Path: "/", Err: unix.ENOSPC})
	if status != http.StatusInsufficientStorage || !errors.Is(e, errdefs.ErrResourceExhausted) {
		t.Errorf("status %d, %+v", status, e)
	}
}

// A request that was read while the daemon ended is not answered from a store that may be closed by then.
func TestNoCallBeginsOnceServeHasEnded(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := New(Options{Log: slog.New(slog.DiscardHandler)}) // without a store
	ended, end := context.WithCancel(t.Context())
	end()
	if err := s.Serve(ended, l); err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	s.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/v1/images", nil))
	if answer.Code != http.StatusServiceUnavailable {
		t.Errorf("%d: %s", answer.Code, answer.Body)
	}
}

func TestNoDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	_, err := NewClient(socket).Images(t.Context())
	if err == nil || !strings.Contains(err.Error(), "is berth serve running? tried "+socket) {
		t.Errorf("%v", err)
	}
}

// CVE-2020-15257: whoever reaches the socket is root on the node, so that its mode is not all that keeps others out.
func TestCVE_2020_15257_OtherUsersAreSentAway(t *testing.T) {
	n := serve(t)
	for path, mode := range map[string]os.FileMode{filepath.Dir(n.socket): 0o755, n.socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	var got []byte
	err := thread.Throwaway(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "socket")
		defer f.Close()
		// Of this thread alone, which is thrown away.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			return errno
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: n.socket}); err != nil {
			return err
		}
		// It may have hung up already, which shows in what is read.
		_, _ = unix.Write(fd, []byte("GET /v1/images HTTP/1.0\r\n\r\n"))
		got, err = io.ReadAll(f)
		if errors.Is(err, unix.ECONNRESET) {
			err = nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 0 {
		t.Errorf("another user is told %q", got)
	}
	until(t, "it is in the log", func() bool { return strings.Contains(n.log.String(), "uid=65534") })
	if _, err := n.Images(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestGarbageIsRefusedAndHarmsNobody(t *testing.T) {
	n := serve(t)
	for name, c := range map[string]struct{ method, path, body, want string }{
		"no JSON":           {"POST", "/v1/images/inspect", "<xml/>", "invalid argument"},
		"nothing":           {"POST", "/v1/images/inspect", "", "invalid argument"},
		"two values":        {"POST", "/v1/images/inspect", `{"names":["a"]}{}`, "more than one value"},
		"unknown field":     {"POST", "/v1/images/inspect", `{"name":"a"}`, "unknown field"},
		"wrong type":        {"POST", "/v1/images/inspect", `{"names":7}`, "cannot unmarshal"},
		"no name":           {"POST", "/v1/images/inspect", `{"names":[]}`, "one is wanted"},
		"NUL":               {"POST", "/v1/images/inspect", `{"names":["\u0000"]}`, "invalid"},
		"a path":            {"POST", "/v1/images/inspect", `{"names":["../../etc/passwd"]}`, "invalid"},
		"no names":          {"POST", "/v1/images/remove", `{"names":[]}`, "none is given"},
		"huge":              {"POST", "/v1/images/pull", `{"image":"` + strings.Repeat("a", 2<<20) + `"}`, "too large"},
		"deep":              {"POST", "/v1/images/pull", strings.Repeat("[", 100_000), "invalid argument"},
		"long reference":    {"POST", "/v1/images/pull", `{"image":"` + strings.Repeat("a/", 10_000) + `"}`, "invalid"},
		"explain nothing":   {"POST", "/v1/registry", `{}`, "empty"},
		"unknown path":      {"GET", "/v2/images", "", "404"},
		"wrong method":      {"DELETE", "/v1/images", "", "405"},
		"path that escapes": {"GET", "/v1/../../etc/passwd", "", "404"},
	} {
		resp, err := n.call(t.Context(), c.method, c.path, strings.NewReader(c.body))
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s: is answered %s", name, resp.Status)
			continue
		}
		if !strings.Contains(err.Error(), c.want) || len(err.Error()) > 2000 {
			t.Errorf("%s: %.2000v, want %s", name, err, c.want)
		}
	}
	for name, raw := range map[string]string{
		"no HTTP":       strings.Repeat("\x00\xff", 5000) + "\r\n\r\n",
		"endless head":  "GET / HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 40_000) + "\r\n",
		"two lengths":   "POST /v1/images/pull HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
		"other upgrade": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"gone half way": "POST /v1/images/pull HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"image\":",
	} {
		c, err := net.Dial("unix", n.socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, raw)
		_ = c.(*net.UnixConn).CloseWrite()
		answer, _ := io.ReadAll(c) // it may be a reset
		c.Close()
		if bytes.Contains(answer, []byte(" 200 ")) {
			t.Errorf("%s: is answered %.200q", name, answer)
		}
	}
	if list, err := n.Images(t.Context()); err != nil || len(list.Images) != 0 {
		t.Errorf("afterwards: %+v %v", list, err)
	}
	n.nothingLeft(t)
}
