package model

import (
	"errors"
	"strings"
)

// ResetAnnotation is on Services: true has established connections of TCP be reset whose endpoint is in none of the Service's
// slices any more, false not, whatever Config.Resets says. Endpoints that are not ready, or terminate, keep theirs.
const ResetAnnotation = "berth.run/reset-connections"

// wish is yes, no, or neither.
type wish uint8

const (
	unsaid wish = iota
	yes
	no
)

func (w wish) or(otherwise bool) bool { return w == yes || w == unsaid && otherwise }

func readWish(text string) (wish, error) {
	switch strings.TrimSpace(text) {
	case "true":
		return yes, nil
	case "false":
		return no, nil
	}
	return unsaid, errors.New("is neither true nor false")
}

// unreset is that connections are not reset although the Service asks for it.
func (m *Model) unreset(e *entry) []Problem {
	if e.spec == nil || e.raw == nil || e.spec.resets != yes || !m.circumstances.noResets {
		return nil
	}
	p := problems{kind: "Service", object: e.name}
	p.add(annotation(ResetAnnotation), "true", "the rules of this node cannot reset connections: they end when one side notices")
	return p.list
}
