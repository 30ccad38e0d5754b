package spell

import "testing"

func TestNearest(t *testing.T) {
	known := []string{"root", "cniConf", "nodePortAddresses", "mode"}
	for name, want := range map[string]string{
		"rooot": "root", "cni-conf": "cniConf", "NODEPORTADRESSES": "nodePortAddresses", "": "root", "modus": "mode",
	} {
		if got := Nearest(name, known); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"root", "rooot", 1}, {"kitten", "sitting", 3}, {"abc", "abc", 0}} {
		if got := distance(tc.a, tc.b); got != tc.want {
			t.Errorf("%s %s: %d, want %d", tc.a, tc.b, got, tc.want)
		}
	}
}
