package cni

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// lease runs f with the lock of a directory of addresses.
func lease(t *testing.T, dir string, f func(*leases)) {
	t.Helper()
	l, err := openLeases(t.Context(), filepath.Base(dir), filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	f(l)
}

// What is known of addresses is what is in the files, whoever has written, removed, replaced or moved them, or the directory.
func TestLeasesAreThoseOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net")
	write := func(dir, name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	take := func(id string, ip string) {
		t.Helper()
		lease(t, dir, func(l *leases) {
			if ok, err := l.Reserve(id, "eth0", net.ParseIP(ip), "0"); !ok || err != nil {
				t.Errorf("%s for %s: %v, %v", ip, id, ok, err)
			}
		})
	}
	take("a", "192.0.2.1")
	changes := []struct {
		what string
		do   func()
	}{
		{"nothing", func() {}},
		{"an address is taken by a program", func() { write(dir, "192.0.2.2", "b\r\neth0") }},
		{"one is taken here", func() { take("c", "192.0.2.3") }},
		{"one is given back by a program", func() { must(os.Remove(dir + "/192.0.2.1")) }},
		{"one gets another owner", func() { write(dir, "192.0.2.2", "d\r\neth0") }},
		{"one is given back, taken and given back", func() {
			must(os.Remove(dir + "/192.0.2.2"))
			write(dir, "192.0.2.2", "e\r\neth0")
			must(os.Remove(dir + "/192.0.2.2"))
		}},
		{"a torn file", func() { write(dir, "192.0.2.4", "") }},
		{"a file from elsewhere", func() {
			elsewhere := t.TempDir()
			write(elsewhere, "f", "f\r\neth0")
			must(os.Link(elsewhere+"/f", dir+"/192.0.2.5"))
			write(dir, ".new", "g\r\neth0")
			must(os.Rename(dir+"/.new", dir+"/192.0.2.6"))
		}},
		{"a directory", func() { must(os.Mkdir(dir+"/192.0.2.7", 0o700)) }},
		{"another directory of that name", func() {
			must(os.Rename(dir, dir+"~"))
			must(os.Mkdir(dir, 0o700))
			write(dir, "192.0.2.8", "h\r\neth0")
		}},
		{"the directory is made anew", func() {
			must(os.RemoveAll(dir))
			take("i", "192.0.2.9")
		}},
		{"the directory above is another one", func() {
			must(os.Rename(filepath.Dir(dir), filepath.Dir(dir)+"~"))
			must(os.MkdirAll(dir, 0o700))
			write(dir, "192.0.2.10", "j\r\neth0")
		}},
		{"more than the kernel tells of", func() {
			var most int
			data, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
			must(err)
			_, err = fmt.Sscan(string(data), &most)
			must(err)
			for n := range most/3 + 100 { // three events each
				name := fmt.Sprintf("%s/x%d", dir, n%2)
				must(os.WriteFile(name, nil, 0o600))
				must(os.Remove(name))
			}
			write(dir, "192.0.2.11", "k\r\neth0")
		}},
	}
	for _, c := range changes {
		c.do()
		want := map[string]string{}
		must(filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() == "lock" {
				return err
			}
			data, err := os.ReadFile(path)
			want[d.Name()] = strings.TrimSpace(string(data))
			return err
		}))
		lease(t, dir, func(l *leases) {
			if !maps.Equal(l.owners, want) {
				t.Errorf("%s: %q, but the files have %q", c.what, l.owners, want)
			}
		})
	}
}

// The files of other pods are not read for a pod: what is done does not grow with their number.
func TestLeasesOfOthersAreNotRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || !watchable(st) {
		t.Skipf("file system %x: %v", st.Type, err)
	}
	const pods = 200
	for n := range pods {
		if err := os.WriteFile(fmt.Sprintf("%s/192.0.2.%d", dir, n), []byte(fmt.Sprintf("pod%d\r\neth0", n)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	lease(t, dir, func(*leases) {})
	reads := readsOf(t, func() {
		for n := range 10 {
			id := fmt.Sprintf("new%d", n)
			lease(t, dir, func(l *leases) {
				if ok, err := l.Reserve(id, "eth0", net.IPv4(192, 0, 3, byte(n)), "0"); !ok || err != nil {
					t.Error(ok, err)
				}
			})
			lease(t, dir, func(l *leases) {
				if len(l.GetByID(id, "eth0")) != 1 {
					t.Errorf("%s has no address", id)
				}
				if err := l.ReleaseByID(id, "eth0"); err != nil {
					t.Error(err)
				}
			})
		}
	})
	t.Logf("%d system calls that read, of 10 pods beside %d", reads, pods)
	if reads > 10*20 {
		t.Errorf("%d system calls that read, of 10 pods beside %d", reads, pods)
	}
}

// readsOf counts what this process reads meanwhile, in system calls.
func readsOf(t *testing.T, f func()) int {
	t.Helper()
	count := func() (n int) {
		data, err := os.ReadFile("/proc/self/io")
		if err != nil {
			t.Skip(err)
		}
		for line := range strings.Lines(string(data)) {
			if _, err := fmt.Sscanf(line, "syscr: %d", &n); err == nil {
				return n
			}
		}
		t.Skip(io.EOF)
		return 0
	}
	before := count()
	f()
	return count() - before
}

// A directory that has two names, as /run and /var/run give it, has one lock and one content: what is taken by one name is
// known, and given back, by the other.
func TestLeasesOfADirectoryByTwoNames(t *testing.T) {
	base := t.TempDir()
	one, other := filepath.Join(base, "run", "net"), filepath.Join(base, "var-run", "net")
	if err := os.Symlink("run", filepath.Join(base, "var-run")); err != nil {
		t.Fatal(err)
	}
	lease(t, one, func(*leases) {})
	ip := net.IPv4(10, 88, 0, 2)
	lease(t, other, func(l *leases) {
		if ok, err := l.Reserve("pod", "eth0", ip, "0"); !ok || err != nil {
			t.Fatal(ok, err)
		}
	})
	lease(t, one, func(l *leases) {
		if !l.has("pod", "eth0") {
			t.Error("what was taken by the other name is not known")
		}
		if err := l.ReleaseByID("pod", "eth0"); err != nil {
			t.Error(err)
		}
	})
	if _, err := os.Stat(filepath.Join(one, ip.String())); !os.IsNotExist(err) {
		t.Errorf("the address is not given back: %v", err)
	}
	lease(t, other, func(l *leases) {
		if ok, err := l.Reserve("next", "eth0", ip, "0"); !ok || err != nil {
			t.Errorf("an address that was given back by the other name is taken: %v, %v", ok, err)
		}
	})
}
