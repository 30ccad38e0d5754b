package images

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const someHex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestReferencesAreNormalised(t *testing.T) {
	for in, want := range map[string]string{
		"busybox":                                      "docker.io/library/busybox:latest",
		"busybox:1.36":                                 "docker.io/library/busybox:1.36",
		"team/app":                                     "docker.io/team/app:latest",
		"localhost/app":                                "localhost/app:latest",
		"localhost:5000/app:v1":                        "localhost:5000/app:v1",
		"registry.k8s.io/pause:3.10":                   "registry.k8s.io/pause:3.10",
		"index.docker.io/library/busybox":              "docker.io/library/busybox:latest",
		"a@sha256:" + someHex:                          "docker.io/library/a@sha256:" + someHex,
		"a:tag@sha256:" + someHex:                      "docker.io/library/a@sha256:" + someHex, // the digest decides
		"[::1]:5000/app":                               "[::1]:5000/app:latest",
		"a@sha512:" + strings.Repeat("a", 128):         "docker.io/library/a@sha512:" + strings.Repeat("a", 128),
		"r.example/" + strings.Repeat("a", 240) + ":v": "r.example/" + strings.Repeat("a", 240) + ":v",
	} {
		got, err := parseReference(in)
		if err != nil || got.String() != want {
			t.Errorf("%s: got %v, %v; want %s", in, got, err, want)
		}
	}
}

func TestBadReferencesAreInvalidArgument(t *testing.T) {
	for _, in := range []string{
		"", " ", "UPPER", "a:", "a:b:c", "a@", "a@sha256:12", "a@sha256:" + strings.ToUpper(someHex), "a@md5:d41d8cd98f00b204e9800998ecf8427e",
		"../../etc/passwd", "a/../b", "/a", "a//b", "a\nb", "a\x00b", "http://r/a", "a?b", "a:" + strings.Repeat("t", 129),
		strings.Repeat("a", 256), someHex, "sha256:" + someHex, "sha256:12ab", "-a", "a/.b", "\u202ea",
	} {
		got, err := parseReference(in)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, %v; want ErrInvalidArgument", in, got, err)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("%q: the error has control characters: %q", in, err)
		}
	}
}

func TestFind(t *testing.T) {
	id := func(hex string) digest.Digest {
		return digest.Digest("sha256:" + hex + strings.Repeat("0", 64-len(hex)))
	}
	s := &Store{images: map[digest.Digest]*imageRecord{}, refs: map[string]digest.Digest{}}
	for _, hex := range []string{"cafe01", "cafe02", "beef", "feed"} {
		s.images[id(hex)] = &imageRecord{}
	}
	s.refs["docker.io/library/busybox:latest"] = id("cafe01")
	s.refs["docker.io/library/beef:latest"] = id("cafe02")
	s.refs["docker.io/library/busybox@sha256:"+someHex] = id("cafe01")
	for name, want := range map[string]digest.Digest{
		"busybox": id("cafe01"), "docker.io/library/busybox:latest": id("cafe01"), "busybox@sha256:" + someHex: id("cafe01"),
		"busybox:none@sha256:" + someHex: id("cafe01"),
		"cafe01":                         id("cafe01"), "sha256:cafe02": id("cafe02"), "fe": id("feed"), string(id("beef")): id("beef"), id("beef").Encoded(): id("beef"),
		"beef": id("cafe02"), // a reference wins over a prefix
	} {
		if got, err := s.find(name); err != nil || got != want {
			t.Errorf("%s: got %s, %v; want %s", name, got, err, want)
		}
	}
	for name, is := range map[string]func(error) bool{
		"": errdefs.IsInvalidArgument, "cafe": errdefs.IsInvalidArgument, "sha256:cafe0": errdefs.IsInvalidArgument, "A B": errdefs.IsInvalidArgument,
		"alpine": errdefs.IsNotFound, "dead": errdefs.IsNotFound, "sha256:dead": errdefs.IsNotFound, string(id("dead")): errdefs.IsNotFound,
		"busybox:1": errdefs.IsNotFound, "busybox@sha256:" + strings.Repeat("1", 64): errdefs.IsNotFound,
	} {
		if got, err := s.find(name); !is(err) {
			t.Errorf("%q: got %s, %v", name, got, err)
		}
	}
}

func TestPauseImagesArePinned(t *testing.T) {
	for ref, want := range map[string]bool{
		"registry.k8s.io/pause:3.10": true, "docker.io/rancher/mirrored/pause@sha256:" + someHex: true, "docker.io/library/pauser:1": false, "pause.example/a:pause": false,
	} {
		if got := isPause(ref); got != want {
			t.Errorf("%s: %v", ref, got)
		}
	}
}
