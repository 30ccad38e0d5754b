package shim

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var linePattern = regexp.MustCompile(`^\S+ (stdout|stderr) ([PF]) `)

func openTestLog(t testing.TB) (*Log, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "0.log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	l := NewLog(f)
	l.now = func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC) }
	t.Cleanup(l.Close)
	return l, path
}

// content reads a log as the kubelet does: partial lines are joined until a full one.
func content(t testing.TB, path, stream string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for line := range bytes.Lines(data) {
		m := linePattern.FindSubmatchIndex(line)
		if m == nil {
			t.Fatalf("line is not in the CRI format: %.80q", line)
		}
		body := line[m[1]:]
		if !bytes.HasSuffix(body, []byte("\n")) {
			t.Fatalf("torn line at the end: %.80q", line)
		}
		if len(body) > maxLine+1 {
			t.Fatalf("line of %d bytes, more than %d", len(body)-1, maxLine)
		}
		if string(line[m[2]:m[3]]) != stream {
			continue
		}
		if string(line[m[4]:m[5]]) == "P" {
			body = body[:len(body)-1]
		}
		out = append(out, body...)
	}
	return out
}

func TestLogLinesHaveTheFormatOfTheCRI(t *testing.T) {
	l, path := openTestLog(t)
	out, errs := l.stream("stdout"), l.stream("stderr")
	out.write([]byte("hello\nhalf"))
	errs.write([]byte("oops\n"))
	out.write([]byte(" done\n\nend"))
	out.end()
	errs.end()
	got, _ := os.ReadFile(path)
	const at = "2026-01-02T03:04:05.000000006Z "
	want := at + "stdout F hello\n" + at + "stderr F oops\n" + at + "stdout F half done\n" + at + "stdout F \n" + at + "stdout P end\n"
	if string(got) != want {
		t.Errorf("log is\n%swant\n%s", got, want)
	}
}

func TestLongLinesAreSplit(t *testing.T) {
	for _, n := range []int{maxLine - 1, maxLine, maxLine + 1, 3*maxLine + 5, 4095} {
		for _, end := range []string{"\n", "\r\n", ""} {
			for _, first := range []int{0, 1, 4094, maxLine} {
				l, path := openTestLog(t)
				s := l.stream("stdout")
				data := []byte(strings.Repeat("x", n) + end)
				cut := min(first, len(data))
				s.write(data[:cut])
				s.write(data[cut:])
				s.end()
				if got := content(t, path, "stdout"); !bytes.Equal(got, data) {
					t.Errorf("%d bytes with end %q, cut at %d: %d bytes come back", n, end, cut, len(got))
				}
			}
		}
	}
}

func TestReopenLosesNoByte(t *testing.T) {
	l, path := openTestLog(t)
	dir := filepath.Dir(path)
	var wg sync.WaitGroup
	wg.Go(func() {
		s := l.stream("stdout")
		for i := range 20000 {
			s.write(fmt.Appendf(nil, "line %d\n", i))
		}
		s.end()
	})
	for i := range 50 {
		if err := os.Rename(path, filepath.Join(dir, fmt.Sprintf("1.%03d", i))); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		l.Reopen(f)
	}
	wg.Wait()
	files, _ := filepath.Glob(filepath.Join(dir, "1.*"))
	var all []byte
	for _, f := range append(files, path) {
		all = append(all, content(t, f, "stdout")...)
	}
	var want []byte
	for i := range 20000 {
		want = fmt.Appendf(want, "line %d\n", i)
	}
	if !bytes.Equal(all, want) {
		t.Errorf("%d bytes in all files, want %d", len(all), len(want))
	}
}

func TestFullDiskDropsAndLeavesNoTornLine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts a tmpfs: needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("cannot mount:", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	path := filepath.Join(dir, "0.log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	l := NewLog(f)
	defer l.Close()
	s := l.stream("stdout")
	for range 2000 {
		s.write([]byte(strings.Repeat("y", 100) + "\n"))
	}
	if l.Dropped() == 0 {
		t.Fatal("nothing was dropped on a full disk")
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0); err != nil {
		t.Fatal(err)
	}
	content(t, path, "stdout") // every line whole
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	s.write([]byte("space again\n"))
	if got := content(t, path, "stdout"); string(got) != "space again\n" {
		t.Errorf("after space was made the log is %q", got)
	}
}

func TestSlowAttachedClientDoesNotBlockTheLog(t *testing.T) {
	r, w, err := pipe(false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l, path := openTestLog(t)
	src, dst, err := pipe(false)
	if err != nil {
		t.Fatal(err)
	}
	var attached sinks
	attached.add(w) // nobody reads r
	done := make(chan struct{})
	go func() { pump(src, l.stream("stdout"), &attached); close(done) }()
	data := bytes.Repeat([]byte(strings.Repeat("z", 99)+"\n"), 40000)
	if _, err := dst.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = dst.Close()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("the log waits for a client that does not read")
	}
	if got := content(t, path, "stdout"); !bytes.Equal(got, data) {
		t.Errorf("%d bytes in the log, want %d", len(got), len(data))
	}
}

func FuzzLogRoundTrip(f *testing.F) {
	f.Add([]byte("a\nb\r\n\n\x00\xff tail"), uint64(1))
	f.Add(bytes.Repeat([]byte("q"), 3*maxLine), uint64(7))
	f.Fuzz(func(t *testing.T, data []byte, seed uint64) {
		l, path := openTestLog(t)
		s := l.stream("stdout")
		r := rand.New(rand.NewPCG(seed, 1))
		for rest := data; len(rest) > 0; {
			n := 1 + r.IntN(len(rest))
			s.write(rest[:n])
			rest = rest[n:]
		}
		s.end()
		if got := content(t, path, "stdout"); !bytes.Equal(got, data) {
			t.Errorf("log gives back %.60q of %.60q", got, data)
		}
	})
}

func BenchmarkLog(b *testing.B) {
	l, _ := openTestLog(b)
	l.now = time.Now
	s := l.stream("stdout")
	p := bytes.Repeat([]byte(strings.Repeat("x", 99)+"\n"), chunk/100)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		s.write(p)
	}
}
