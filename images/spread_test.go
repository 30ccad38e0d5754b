package images

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestLayersGoElsewhere: not where others were deleted, as long as there is another place.
func TestLayersGoElsewhere(t *testing.T) {
	s := openStore(t)
	s.deletions.on = true
	dir, err := s.makeStaged()
	if err != nil {
		t.Fatal(err)
	}
	if s.deletions.shuns(dir) {
		t.Error("nothing was deleted, and it is shunned")
	}
	s.deletions.shun(dir)
	if !s.deletions.shuns(dir) {
		t.Error("its place is not shunned")
	}
	if s.deletions.shun(dir + "-none"); len(s.deletions.until) != 1 {
		t.Errorf("shunned: %v", s.deletions.until)
	}
	for at := range s.deletions.until {
		s.deletions.until[at] = time.Now().Add(-time.Second)
	}
	if s.deletions.shuns(dir) {
		t.Error("its place is shunned for ever")
	}
	// Where there is no other place, any will do, and nothing is left of the tries.
	for at := range uint64(1 << 20) {
		s.deletions.until[at] = time.Now().Add(time.Hour)
	}
	if _, err := s.makeStaged(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Dir(dir))
	if err != nil || len(left) != 2 {
		t.Errorf("there are %d, want 2: %v", len(left), err)
	}
}
