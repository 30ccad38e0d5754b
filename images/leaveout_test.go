package images

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// A registry that is named as its own mirror was left out as such, and then there was nobody to ask: what it had done wrong
// was told as "not found".
func TestLastHostIsNeverLeftOut(t *testing.T) {
	for _, c := range []struct{ hosts, fail, left []string }{
		{[]string{"a", "b"}, []string{"a"}, []string{"b"}},
		{[]string{"a", "b"}, []string{"a", "b"}, []string{"b"}},
		{[]string{"a", "b", "c"}, []string{"b", "c"}, []string{"a", "c"}},
		{[]string{"a"}, []string{"a"}, []string{"a"}},
		{[]string{"a", "a"}, []string{"a"}, []string{"a", "a"}},
		{[]string{"b", "a", "a"}, []string{"a", "b"}, []string{"a", "a"}},
	} {
		src := &source{out: map[string]bool{}}
		for _, h := range c.hosts {
			src.hosts = append(src.hosts, docker.RegistryHost{Host: h})
		}
		for range 2 {
			src.leaveOut(c.fail...)
		}
		var left []string
		for _, h := range src.hosts {
			if !src.out[h.Host] {
				left = append(left, h.Host)
			}
		}
		if !slices.Equal(left, c.left) {
			t.Errorf("of %v, which fail %v, are left %v, not %v", c.hosts, c.fail, left, c.left)
		}
	}
}
