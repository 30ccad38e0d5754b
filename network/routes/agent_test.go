package routes

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Turned off, a daemon removes what it has noted, and nothing where it has noted nothing: that is another daemon's.
func TestOffRemovesWhatWasNoted(t *testing.T) {
	h := newHost(t)
	h.apply(Auto, nearNode, farNode)
	note := filepath.Join(t.TempDir(), "noderoutes")
	off := func() {
		h.do(func() error {
			a, err := Start(Options{Mode: Off, Note: note})
			if err != nil {
				return err
			}
			return a.Close()
		})
	}
	off()
	h.wantState("without a note", slices.Concat(nearState, ends, farState)...)
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	off()
	h.wantState("with a note")
	if _, err := os.Stat(note); !os.IsNotExist(err) {
		t.Errorf("the note: %v", err)
	}
}
