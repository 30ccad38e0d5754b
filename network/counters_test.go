package network

import (
	"reflect"
	"testing"
)

const netDev = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1000 10 0 0 0 0 0 0 1000 10 0 0 0 0 0 0
  eth0:     656       8    1    2    3     4          5         6      746       9    7    8    9     10       11          12
eth0:1: 18446744073709551615 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
vethab12cd: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
`

func TestCountersOfInterfaces(t *testing.T) {
	want := []Counters{
		{"eth0", Direction{656, 8, 1, 2}, Direction{746, 9, 7, 8}},
		{"eth0:1", Direction{1<<64 - 1, 1, 2, 3}, Direction{8, 9, 10, 11}},
	}
	got, err := parseCounters([]byte(netDev))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v\nwant %+v", got, err, want)
	}
	for _, bad := range []string{"eth0: 1 2 3\n", "eth0: x 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"} {
		if got, err := parseCounters([]byte(bad)); err == nil {
			t.Errorf("%q: %+v and no error", bad, got)
		}
	}
	if got, err := ReadCounters(1 << 30); err == nil {
		t.Errorf("no process: %+v and no error", got)
	}
}

func FuzzCounters(f *testing.F) {
	f.Add([]byte(netDev))
	f.Add([]byte(":\neth0:::0"))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := parseCounters(data)
		if err != nil && all != nil {
			t.Errorf("%+v and %v", all, err)
		}
		for _, c := range all {
			if internal(c.Name) {
				t.Errorf("%q is told", c.Name)
			}
		}
	})
}
