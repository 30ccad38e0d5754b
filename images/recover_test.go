package images

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/step"
)

// A process of its own pulls, and is killed where the fail point says.
const (
	envRoot = "BERTH_TEST_IMAGES_ROOT"
	envRef  = "BERTH_TEST_IMAGES_REF"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(envRoot); root != "" {
		s, err := Open(Options{Root: root})
		if err == nil {
			_, err = s.Pull(context.Background(), os.Getenv(envRef), nil)
			err = errors.Join(err, s.Close())
		}
		if err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func pullElsewhere(t *testing.T, root, ref string, env ...string) error {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, envRoot+"="+root, envRef+"="+ref)...)
	out, err := cmd.CombinedOutput()
	if len(out) > 0 {
		t.Logf("%s", out)
	}
	return err
}

// TestKilledPull kills a pull before and after each of its steps. The image is there whole or not at all, nothing of the
// attempt stays, and the next pull succeeds.
func TestKilledPull(t *testing.T) {
	needRoot(t)
	reg := imagestest.NewRegistry(t)
	img := imagestest.NewImage(imagestest.Layer(imagestest.File("f", "1")), imagestest.ZstdLayer(imagestest.Tar(imagestest.File("g", "2"))))
	reg.Push("a", "b", img)
	ref := reg.Host() + "/a:b"

	list := filepath.Join(t.TempDir(), "points")
	if err := pullElsewhere(t, filepath.Join(t.TempDir(), "images"), ref, step.EnvList+"="+list); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(list)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var points []string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		points = append(points, sc.Text())
	}
	if len(points) < 16 || !slices.Contains(points, "PullImage.publish.after") {
		t.Fatalf("points %v: want two of each step", points)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "images")
			err := pullElsewhere(t, root, ref, step.EnvKill+"="+point)
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("got %v, want it killed", err)
			}
			s, err := Open(Options{Root: root})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}()
			there := point == "PullImage.commit.after"
			if n := len(s.Images()); n != map[bool]int{false: 0, true: 1}[there] {
				t.Errorf("%d images after the restart", n)
			}
			if n := len(leftovers(t, s)); n != map[bool]int{false: 0, true: 2}[there] {
				t.Errorf("left after the restart: %v", leftovers(t, s))
			}
			got := mustPull(t, s, ref)
			if err := s.Prepare("k", got.ID, nil); err != nil {
				t.Fatal(err)
			}
			target := mountPoint(t)
			if err := s.Mount(context.Background(), "k", target); err != nil {
				t.Fatal(err)
			}
			for name, want := range map[string]string{"f": "1", "g": "2"} {
				if data, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(data) != want {
					t.Errorf("%s: %q, %v", name, data, err)
				}
			}
			if err := errors.Join(s.Unmount(target), s.Release("k")); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDamagedStoresRecover: what is listed after a restart is complete, whatever was lost.
func TestDamagedStoresRecover(t *testing.T) {
	needRoot(t)
	reg := imagestest.NewRegistry(t)
	base := imagestest.Layer(imagestest.File("f", "1"))
	reg.Push("a", "one", imagestest.NewImage(base))
	reg.Push("a", "two", imagestest.NewImage(base, imagestest.Layer(imagestest.File("g", "2"))))
	for name, c := range map[string]struct {
		damage func(s *Store, two *Image) error
		images int
		layers int
	}{
		"lost top layer":    {func(s *Store, two *Image) error { return os.RemoveAll(s.path(layersDir, two.Layers[1].dir())) }, 1, 1},
		"lost base layer":   {func(s *Store, two *Image) error { return os.RemoveAll(s.path(layersDir, two.Layers[0].dir())) }, 0, 0},
		"unknown layer":     {func(s *Store, _ *Image) error { return os.Mkdir(s.path(layersDir, "sha256-feed"), 0o755) }, 2, 2},
		"staged layer":      {func(s *Store, _ *Image) error { return os.MkdirAll(s.path(tmpDir, "x", "y"), 0o755) }, 2, 2},
		"unreadable image":  {func(s *Store, two *Image) error { return put(s, imagesBucket, string(two.ID), "{") }, 1, 1},
		"unreadable layer":  {func(s *Store, two *Image) error { return put(s, layersBucket, string(two.Layers[1]), "{") }, 1, 1},
		"reference to none": {func(s *Store, _ *Image) error { return put(s, refsBucket, "r.example/x:y", "sha256:"+someHex) }, 2, 2},
		"nonsense as keys":  {func(s *Store, _ *Image) error { return put(s, layersBucket, "../../x", `{"bytes":1}`) }, 2, 2},
		"a key without dig": {func(s *Store, _ *Image) error { return put(s, imagesBucket, "x", `{"layers":[]}`) }, 2, 2},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "images")
			s, err := Open(Options{Root: root})
			if err != nil {
				t.Fatal(err)
			}
			mustPull(t, s, reg.Host()+"/a:one")
			two := mustPull(t, s, reg.Host()+"/a:two")
			if err := errors.Join(c.damage(s, two), s.Close()); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time nothing is left to repair
				if s, err = Open(Options{Root: root}); err != nil {
					t.Fatal(err)
				}
				if n := len(s.Images()); n != c.images {
					t.Errorf("%d images, want %d", n, c.images)
				}
				if left := leftovers(t, s); len(left) != c.layers {
					t.Errorf("on disk: %v, want %d layers", left, c.layers)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			if s, err = Open(Options{Root: root}); err != nil {
				t.Fatal(err)
			}
			mustPull(t, s, reg.Host()+"/a:one")
			mustPull(t, s, reg.Host()+"/a:two")
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func put(s *Store, bucket []byte, key, value string) error {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	if err := tx.Bucket(bucket).Put([]byte(key), []byte(value)); err != nil {
		return err
	}
	return tx.Commit()
}

func TestRecordsSurviveRestart(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "images")
	reg := imagestest.NewRegistry(t)
	img := smallImage("x")
	img.Config.Config.Env = []string{"A=b"}
	img.Config.Config.Labels = map[string]string{"io.kubernetes.x": "y"}
	reg.Push("a", "b", img)
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	before := mustPull(t, s, reg.Host()+"/a:b")
	usage := s.Usage()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Options{Root: root}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	after, err := s.Image(reg.Host() + "/a:b")
	if err != nil || after.ID != before.ID || after.Size != before.Size || !slices.Equal(after.RepoTags, before.RepoTags) ||
		!slices.Equal(after.RepoDigests, before.RepoDigests) || strings.Join(after.Config.Config.Env, " ") != "A=b" || after.Config.Config.Labels["io.kubernetes.x"] != "y" {
		t.Errorf("got %+v, %v; was %+v", after, err, before)
	}
	if s.Usage() != usage || usage.Bytes == 0 || usage.Inodes == 0 {
		t.Errorf("usage %+v, was %+v", s.Usage(), usage)
	}
	if after.ID != digest.FromBytes(img.Build().Blobs[before.ID]) {
		t.Errorf("id %s is not the configuration's digest", after.ID)
	}
}
