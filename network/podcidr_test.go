package network

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestPodCIDRsSurviveARestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "podcidr")
	log := slog.New(slog.DiscardHandler)
	open := func() *podCIDRs { return openPodCIDRs(file, nil, log) }
	p := open()
	p.set("10.1.0.0/24,fd00:1::/64")
	want := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")}
	p.set("")                                       // "not known yet" does not forget
	p.set("nonsense")                               // is ignored
	p.set("10.0.0.0/")                              // too
	p.set("10.2.0.0/24" + strings.Repeat(",", 1e6)) // too
	if got := p.get(); !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
	if got := open().get(); !slices.Equal(got, want) {
		t.Errorf("after a restart: %v", got)
	}
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v %v", entries, err)
	}
	for _, torn := range []string{"", "10.1.0", strings.Repeat("10.1.0.0/24,", 1000)} {
		if err := os.WriteFile(file, []byte(torn), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := open().get(); len(got) != 0 {
			t.Errorf("torn file %.20q: %v", torn, got)
		}
	}
}

func TestParsePodCIDRs(t *testing.T) {
	for in, want := range map[string]string{
		"10.244.1.0/24":                "10.244.1.0/24",
		"10.244.1.7/24":                "10.244.1.0/24",
		"10.244.1.0/24, fd00:1::/64":   "10.244.1.0/24,fd00:1::/64",
		"fd00:1::/64,10.244.1.0/30":    "fd00:1::/64,10.244.1.0/30",
		"fd00:1::/126":                 "fd00:1::/126",
		"":                             "",
		"x":                            "",
		"10.244.1.0":                   "",
		"10.244.1.0/33":                "",
		"10.244.1.0/24,":               "",
		"10.244.1.0/31":                "",
		"fd00:1::/127":                 "",
		"10.1.0.0/24,10.2.0.0/24":      "",
		"fd00:1::/64,fd00:2::/64":      "",
		"0.0.0.0/0":                    "",
		"::/0":                         "",
		"127.0.0.0/24":                 "",
		"224.0.0.0/24":                 "",
		"169.254.0.0/16":               "",
		"fe80::/64":                    "",
		"::ffff:10.1.0.0/120":          "",
		"10.1.0.0/24,fd00::/64,::1/64": "",
	} {
		got, err := ParsePodCIDRs(in)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q is taken for %v", in, got)
		case want != "" && (err != nil || joinCIDRs(got) != want):
			t.Errorf("%q: %v, %v", in, got, err)
		case in != "" && err != nil && !errors.Is(err, errdefs.ErrInvalidArgument):
			t.Errorf("%q: class of %v", in, err)
		}
	}
}
