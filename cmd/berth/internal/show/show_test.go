package show

import (
	"bytes"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/vbauerster/mpb/v8"

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
	for n, want := range map[int64]string{0: "0.0b", 999: "999.0b", 1000: "1.0KB", 4_300_000: "4.3MB", 1 << 62: "4611686.0TB", -1: "0.0b"} {
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
docker.io/library/a:b: layer 1 of 2 (` + one + `): present, 500.0b
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
