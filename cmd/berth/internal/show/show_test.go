package show

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/vbauerster/mpb/v8"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/admin"
)

func TestTable(t *testing.T) {
	var out bytes.Buffer
	err := Table(&out, []string{"IMAGE", "TAG", "SIZE"}, [][]string{{"docker.io/library/busybox", "1.36", "4.3MB"}, {"evil\x1b[2Jname\n", "é", ""}})
	want := "IMAGE                       TAG    SIZE\n" +
		"docker.io/library/busybox   1.36   4.3MB\n" +
		`evil\x1b[2Jname\n           é` + "\n"
	if err != nil || out.String() != want {
		t.Errorf("%v\n%q, want\n%q", err, out.String(), want)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0B", 999: "999B", 1000: "1.0KB", 4_300_000: "4.3MB", 1 << 62: "4611686.0TB", -1: "0B"} {
		if got := Size(n, false); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	if got := Size(uint64(1)<<63, true); got != "9223372036854775808" {
		t.Errorf("exactly: %s", got)
	}
	if got := Size(uint64(1)<<63, false); strings.Contains(got, "-") {
		t.Errorf("more than fits: %s", got)
	}
}

// steps are a pull of two layers, as it is told.
func steps() []*admin.Pull {
	pull := func(state images.PullState, present, other images.LayerState, fetched int64) *admin.Pull {
		return &admin.Pull{Reference: "docker.io/library/a:b", State: state, Fetched: fetched, Total: 2_000_000, Layers: []admin.PullLayer{
			{Digest: digest.FromString("1"), State: present, Size: 500, Fetched: 0},
			{Digest: digest.FromString("2"), State: other, Size: 2_000_000, Fetched: fetched},
		}}
	}
	return []*admin.Pull{
		{Reference: "docker.io/library/a:b", State: images.PullResolving},
		pull(images.PullUnpacking, images.LayerPresent, images.LayerWaiting, 0),
		pull(images.PullUnpacking, images.LayerPresent, images.LayerFetching, 1_000_000),
		pull(images.PullUnpacking, images.LayerPresent, images.LayerFetching, 0), // it begins anew
		pull(images.PullUnpacking, images.LayerPresent, images.LayerFetching, 2_000_000),
		pull(images.PullFinishing, images.LayerPresent, images.LayerUnpacked, 2_000_000),
	}
}

func TestLinesTellEachLayerOnce(t *testing.T) {
	var out bytes.Buffer
	p := NewProgress(&out)
	for _, s := range steps() {
		p.Update(s)
	}
	p.End()
	one, two := short(digest.FromString("1")), short(digest.FromString("2"))
	want := `docker.io/library/a:b: resolving
docker.io/library/a:b: unpacking
docker.io/library/a:b: layer 1 of 2 (` + one + `): present, 500B
docker.io/library/a:b: finishing
docker.io/library/a:b: layer 2 of 2 (` + two + `): unpacked, 2.0MB
`
	if out.String() != want {
		t.Errorf("%s\nwant\n%s", out.String(), want)
	}
}

func TestBarsOfATerminal(t *testing.T) {
	for name, until := range map[string]int{"to the end": 6, "broken off": 3, "at once": 0} {
		var out bytes.Buffer
		b := newBars(mpb.WithOutput(&out), mpb.ForceTTY())
		for _, s := range steps()[:until] {
			b.Update(s)
		}
		b.End() // returns, however far it was
		text := out.String()
		if until == 0 {
			continue
		}
		for _, want := range []string{short(digest.FromString("1")), "present", short(digest.FromString("2"))} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: there is no %q in\n%s", name, want, text)
			}
		}
		if until == 6 && !strings.Contains(text, "2.0 MB / 2.0 MB") {
			t.Errorf("%s: the second is not whole in\n%s", name, text)
		}
	}
}

// terminal is a pseudo terminal, and what has been written to it when read is called.
func terminal(t *testing.T) (slave *os.File, read func() string) {
	t.Helper()
	open := func(path string) *os.File {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	master := open("/dev/ptmx")
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave = open(fmt.Sprintf("/dev/pts/%d", n))
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	text := make(chan string)
	go func() {
		data, _ := io.ReadAll(master) // the end is EIO
		text <- string(data)
	}()
	return slave, func() string {
		slave.Close()
		return <-text
	}
}

func TestATerminalIsKnown(t *testing.T) {
	t.Setenv("TERM", "xterm")
	slave, read := terminal(t)
	p := NewProgress(slave)
	c := NewCounter(slave, "sent", 1000)
	for _, s := range steps() {
		p.Update(s)
	}
	p.End()
	if _, err := c.Write(make([]byte, 500)); err != nil {
		t.Error(err)
	}
	c.End()
	text := read()
	for _, want := range []string{short(digest.FromString("2")), "2.0 MB / 2.0 MB", "sent", "500.0 b / 1.0 KB", "\x1b["} {
		if !strings.Contains(text, want) {
			t.Errorf("the terminal shows no %q:\n%q", want, text)
		}
	}
	t.Setenv("TERM", "dumb")
	slave, read = terminal(t)
	p = NewProgress(slave)
	p.Update(steps()[0])
	p.End()
	if text := read(); !strings.HasPrefix(text, "docker.io/library/a:b: resolving") || strings.Contains(text, "\x1b") {
		t.Errorf("a dumb one shows %q", text)
	}
	if c := NewCounter(io.Discard, "sent", 1); c.bar != nil {
		t.Error("what is no terminal has a bar")
	}
}
