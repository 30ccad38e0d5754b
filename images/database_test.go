package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/berth-run/berth/images/imagestest"
)

// randomBytes are the same for the same seed, and compress to nothing less.
func randomBytes(seed byte, n int) []byte {
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// scribble puts noise into a file.
func scribble(path string, off, n int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(randomBytes(1, int(n)), off)
	return errors.Join(err, f.Close())
}

// TestDatabaseIsLost: containerd#5854, #12302. A node whose database is damaged or gone starts, its containers keep what they
// run on, and the next pulls bring back what was lost.
func TestDatabaseIsLost(t *testing.T) {
	needRoot(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(richLayer(), imagestest.Layer(imagestest.File("top", "1"))))
	ref, ctx := reg.Host()+"/a:b", context.Background()
	for name, c := range map[string]struct {
		damage func(db string) error
		images int // that are there still
	}{
		"deleted":         {os.Remove, 0},
		"empty":           {func(db string) error { return os.Truncate(db, 0) }, 0},
		"a hundred bytes": {func(db string) error { return os.Truncate(db, 100) }, 0},
		"without meta":    {func(db string) error { return scribble(db, 0, 8192) }, 0},
		"no records":      {func(db string) error { return scribble(db, 8192, 1<<20) }, 0},
		"one meta page":   {func(db string) error { return scribble(db, 0, 4096) }, 1},
		"no free pages":   {func(db string) error { return scribblePage(db, func(m dbMeta) uint64 { return m.freelist }) }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "images")
			open := func() *Store {
				t.Helper()
				s, err := Open(Options{Root: root})
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			s := open()
			img := mustPull(t, s, ref)
			running, volume, fresh := mountPoint(t), mountPoint(t), mountPoint(t)
			if err := errors.Join(s.Prepare("k", img.ID, nil), s.Mount(ctx, "k", running), s.MountView(ctx, img.ID, volume, nil),
				os.WriteFile(filepath.Join(running, "mine"), []byte("2"), 0o600), s.Close(), c.damage(filepath.Join(root, dbName))); err != nil {
				t.Fatal(err)
			}
			wantMounted := func(when string) {
				t.Helper()
				for at, want := range map[string]string{running + "/top": "1", running + "/mine": "2", volume + "/top": "1"} {
					if got, err := os.ReadFile(at); err != nil || string(got) != want {
						t.Errorf("%s: %s has %q, %v", when, at, got, err)
					}
				}
			}
			s = open()
			s.WaitDeleted(ctx)
			wantMounted("after the start")
			if len(s.Images()) != c.images || len(s.Keys()) != 1 {
				t.Errorf("images %v, root file systems %v", s.Images(), s.Keys())
			}
			wantWhole(t, s)
			again := mustPull(t, s, ref)
			s.WaitDeleted(ctx)
			wantMounted("after the pull")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open()
			defer func() { _ = s.Close() }()
			s.WaitDeleted(ctx)
			wantMounted("after another start")
			if err := errors.Join(s.Prepare("new", again.ID, nil), s.Mount(ctx, "new", fresh)); err != nil {
				t.Error(err)
			}
			if got, err := os.ReadFile(filepath.Join(fresh, "top")); err != nil || string(got) != "1" {
				t.Errorf("a new container: %q, %v", got, err)
			}
			wantWhole(t, s)
			if err := errors.Join(s.Unmount(running), s.Release("k"), s.Unmount(volume), s.Unmount(fresh), s.Release("new")); err != nil {
				t.Error(err)
			}
			if left := leftovers(t, s); len(left) != 2 || len(s.retired) != 0 || len(s.holds) != 0 {
				t.Errorf("left: %v, retired %v, holds %v", left, s.retired, s.holds)
			}
		})
	}
}

// scribblePage puts noise into the header of a page that the newest meta page names.
func scribblePage(path string, which func(dbMeta) uint64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	meta, err := readMeta(f)
	return errors.Join(err, scribble(path, int64(which(meta)*meta.pageSize), 16))
}

// TestVersionOfTheDatabase: what another version of bbolt has written is not damaged.
func TestVersionOfTheDatabase(t *testing.T) {
	path := writeDatabase(t, 10)
	for _, page := range []int64{0, 4096} {
		if err := scribble(path, page+dbPageHeader+4, 4); err != nil {
			t.Fatal(err)
		}
	}
	if db, err := openDatabase(path, discardLog); err == nil || !strings.Contains(err.Error(), "version mismatch") {
		t.Errorf("got %v, %v", db, err)
	}
}

// writeDatabase makes a database with what is hard to read: buckets in one element and of several levels, values of several
// pages, and pages that are free again.
func writeDatabase(t testing.TB, rounds int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), dbName)
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	r := rand.New(rand.NewPCG(1, 2))
	for round := range rounds {
		if err := db.Update(func(tx *bolt.Tx) error {
			for _, name := range buckets[:1+round%len(buckets)] {
				b, err := tx.CreateBucketIfNotExists(name)
				if err != nil {
					return err
				}
				for range 40 {
					key := fmt.Appendf(nil, "key-%d", r.IntN(1000))
					if r.IntN(3) == 0 {
						err = errors.Join(err, b.Delete(key))
					} else {
						err = errors.Join(err, b.Put(key, bytes.Repeat([]byte{'x'}, r.IntN(200)*r.IntN(100))))
					}
				}
				if err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func check(t *testing.T, path string) (map[string]string, []error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := map[string]string{}
	wrong, err := checkDatabase(f, func(bucket, key, value []byte) { all[string(bucket)+"/"+string(key)] = string(value) })
	if err != nil {
		t.Fatal(err)
	}
	return all, wrong
}

// readDatabase has bbolt read all, and check its file.
func readDatabase(path string) (all map[string]string, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("bbolt: %v", r)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	all = map[string]string{}
	return all, db.View(func(tx *bolt.Tx) (err error) {
		for e := range tx.Check() {
			err = errors.Join(err, e)
		}
		return errors.Join(err, tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				all[string(name)+"/"+string(k)] = string(v)
				return nil
			})
		}))
	})
}

// TestDatabaseIsReadAsBboltReadsIt, in whatever state.
func TestDatabaseIsReadAsBboltReadsIt(t *testing.T) {
	for _, rounds := range []int{1, 2, 3, 10, 60} {
		path := writeDatabase(t, rounds)
		got, wrong := check(t, path)
		want, err := readDatabase(path)
		if err != nil || len(wrong) != 0 || !maps.Equal(got, want) || len(want) == 0 {
			t.Errorf("%d rounds: %d records and %v; bbolt reads %d, %v", rounds, len(got), wrong, len(want), err)
		}
	}
}

// TestDamagedPagesAreFound: where nothing is found, bbolt reads on without a fault; where something is, a database is made
// of the rest that has nothing wrong with it.
func TestDamagedPagesAreFound(t *testing.T) {
	path := writeDatabase(t, 12)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all, _ := check(t, path)
	var pages []int // that say what they are, and are no part of a value
	for at := 0; at < len(whole); at += 4096 {
		if u64(whole, uint64(at)) == uint64(at/4096) {
			pages = append(pages, at)
		}
	}
	r := rand.New(rand.NewPCG(3, 4))
	found, kept := 0, 0
	for range 100 {
		data := bytes.Clone(whole)
		at := pages[r.IntN(len(pages))] + r.IntN(64) // where headers and elements are
		data[at] ^= byte(1 + r.IntN(255))
		damaged := filepath.Join(t.TempDir(), dbName)
		if err := os.WriteFile(damaged, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, wrong := check(t, damaged); len(wrong) > 0 {
			found++
			if err := mendDatabase(damaged, discardLog); err != nil && !strings.Contains(err.Error(), "version mismatch") {
				t.Errorf("byte %d: %v", at, err)
			}
		}
		got, err := readDatabase(damaged)
		if err != nil && !strings.Contains(err.Error(), "version mismatch") {
			t.Errorf("byte %d: is taken for right, and bbolt says %v", at, err)
		}
		if len(got) > len(all)*3/4 {
			kept++
		}
	}
	t.Logf("%d of 100 were found damaged, %d had most records still", found, kept)
	if found < 30 || kept < 50 {
		t.Errorf("%d were found damaged, %d had most records still: the test shows little", found, kept)
	}
}

// TestVerifyFindsADamagedDatabase, and says how it is mended, and asks it for nothing more: what bbolt has mapped of a file that
// became shorter ends the process.
func TestVerifyFindsADamagedDatabase(t *testing.T) {
	needRoot(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	for name, damage := range map[string]func(db string) error{
		"a page":  func(db string) error { return scribblePage(db, func(m dbMeta) uint64 { return m.root }) },
		"deleted": os.Remove,
		"half":    func(db string) error { return os.Truncate(db, 16<<10) },
		"empty":   func(db string) error { return os.Truncate(db, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "images")
			s, err := Open(Options{Root: root})
			if err != nil {
				t.Fatal(err)
			}
			mustPull(t, s, reg.Host()+"/a:b")
			if err := damage(filepath.Join(root, dbName)); err != nil {
				t.Fatal(err)
			}
			r := mustVerify(t, s, VerifyOptions{Deep: true, Repair: true})
			if !r.Damaged() || r.Findings[0].Kind != FoundDatabase || !strings.Contains(r.Findings[0].Error, "restart") {
				t.Errorf("found %+v", r.Findings)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			var log bytes.Buffer
			if s, err = Open(Options{Root: root, Log: slog.New(slog.NewTextHandler(&log, nil))}); err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if !strings.Contains(log.String(), "database of images is") {
				t.Errorf("the log does not say what was lost: %s", &log)
			}
			mustPull(t, s, reg.Host()+"/a:b")
			wantWhole(t, s)
		})
	}
}
