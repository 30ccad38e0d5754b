package program

import (
	"errors"
	"testing"
)

// Differences count that were there while nothing was changed; else it is looked again, and not without end.
func TestSettled(t *testing.T) {
	differs, same := &Inspection{Differences: []Difference{{What: Missing}}}, &Inspection{}
	for _, tc := range []struct {
		name    string
		changes func(w *Work, look int) // while it is looked
		finds   []*Inspection
		looks   int
		differs bool
	}{
		{"nothing differs", func(*Work, int) {}, []*Inspection{same}, 1, false},
		{"nothing is changed", func(*Work, int) {}, []*Inspection{differs, same}, 1, true},
		{"a change comes in between", func(w *Work, look int) {
			if look == 0 {
				w.Lock()
				w.Unlock() //nolint:staticcheck // that is the change
			}
		}, []*Inspection{differs, same}, 2, false},
		{"a change was under way", func(w *Work, look int) {
			if look == 0 {
				w.Unlock()
			}
		}, []*Inspection{differs, same}, 2, false},
		{"there is always one", func(w *Work, _ int) {
			w.Lock()
			w.Unlock() //nolint:staticcheck // that is the change
		}, []*Inspection{differs, differs, differs, same}, tries, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var w Work
			if _, err := w.Settled(nil); !errors.Is(err, ErrLoading) {
				t.Errorf("before the first Sync has ended: %v", err)
			}
			w.Loaded()
			if tc.name == "a change was under way" {
				w.Lock()
			}
			looks := 0
			found, err := w.Settled(func() (*Inspection, error) {
				tc.changes(&w, looks)
				looks++
				return tc.finds[looks-1], nil
			})
			if err != nil || looks != tc.looks || (len(found.Differences) > 0) != tc.differs {
				t.Errorf("%d looks, %+v, %v", looks, found, err)
			}
		})
	}
}
