package pods

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestJudgementOfADisk(t *testing.T) {
	for _, tc := range []struct {
		name          string
		fs            unix.Statfs_t
		lasting, full string
	}{
		{"with room", unix.Statfs_t{Bfree: 1, Files: 10, Ffree: 1}, "", ""},
		{"without a count of inodes", unix.Statfs_t{Bfree: 1}, "", ""},
		{"read-only", unix.Statfs_t{Bfree: 1, Flags: unix.ST_RDONLY}, "StorageReadOnly", ""},
		{"read-only and full", unix.Statfs_t{Flags: unix.ST_RDONLY}, "StorageReadOnly", ""},
		{"full", unix.Statfs_t{Files: 10, Ffree: 5}, "", "StorageFull"},
		{"out of inodes", unix.Statfs_t{Bfree: 1, Files: 10}, "", "StorageFull"},
	} {
		lasting, full := judgeDisk("/somewhere", tc.fs)
		for _, p := range []struct {
			got  *Problem
			want string
		}{{lasting, tc.lasting}, {full, tc.full}} {
			if p.want == "" && p.got != nil || p.want != "" && (p.got == nil || p.got.Reason != p.want || !strings.Contains(p.got.Message, "/somewhere")) {
				t.Errorf("%s: %v, want %q", tc.name, p.got, p.want)
			}
		}
	}
	if lasting, _ := statDisk("/no/such/directory"); lasting == nil || lasting.Reason != "StorageNotReady" {
		t.Errorf("what is not there: %v", lasting)
	}
}

// A dead disk holds up nobody who asks, and is not asked again while it does not answer.
func TestHealthOfADiskThatHangs(t *testing.T) {
	var looks atomic.Int32
	release := make(chan struct{})
	h := &health{wait: time.Millisecond, look: func() Health { looks.Add(1); <-release; return Health{} }}
	for range 3 {
		got := h.get(t.Context())
		if got.Runtime == nil || got.Storage == nil || got.Runtime.Reason != "NotAnswering" {
			t.Fatalf("%+v", got)
		}
		h.at = time.Time{}
	}
	if n := looks.Load(); n != 1 {
		t.Errorf("%d looks hang", n)
	}
	close(release)
	h.wait = time.Minute
	if got := h.get(t.Context()); got.Runtime != nil || got.Storage != nil {
		t.Errorf("once it answers: %+v", got)
	}
}

func TestHealthIsLookedAtOnceASecond(t *testing.T) {
	var looks atomic.Int32
	full := &Problem{"StorageFull", "x"}
	h := &health{wait: time.Minute, look: func() Health { looks.Add(1); return Health{Storage: full} }}
	for range 100 {
		if got := h.get(t.Context()); got.Storage != full || got.Runtime != nil {
			t.Fatalf("%+v", got)
		}
		h.at = time.Now() // however slow this machine is
	}
	if n := looks.Load(); n != 1 {
		t.Errorf("%d looks", n)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	hangs := make(chan struct{})
	defer close(hangs)
	h.at, h.look = time.Time{}, func() Health { <-hangs; return Health{} }
	if got := h.get(gone); got.Storage != full {
		t.Errorf("who has gone gets %+v", got)
	}
}
