package model

import (
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/types"
)

// An object can have as many mistakes as it has bytes; so many of them are told.
const maxProblems = 16

// A Problem keeps so many bytes of a value.
const maxValue = 80

// problems gathers what is wrong with one object.
type problems struct {
	kind   string
	object types.NamespacedName
	list   []Problem
}

// add notes a field whose value is left out.
func (p *problems) add(field, value, reason string) {
	if len(p.list) >= maxProblems {
		return
	}
	if len(p.list) == maxProblems-1 {
		field, value, reason = "", "", "there is more that is wrong with it"
	}
	if len(value) > maxValue {
		value = value[:maxValue] + "..."
	}
	p.list = append(p.list, Problem{Kind: p.kind, Object: p.object, Field: field, Value: value, Reason: reason})
}

// at is add for an item of a list.
func (p *problems) at(field string, index int, rest, value, reason string) {
	if len(p.list) < maxProblems {
		p.add(fmt.Sprintf("%s[%d]%s", field, index, rest), value, reason)
	}
}

// subject names an object that has problems; those of its own and those with others' addresses are told apart.
type subject struct {
	kind   string
	object types.NamespacedName
	shared bool
}

// journal is the problems that objects have now, and those that have not been told of yet.
type journal struct {
	now    map[subject][]Problem
	untold []Problem
}

// set replaces the problems of a subject; those that it had before are not told again.
func (j *journal) set(s subject, list []Problem) {
	old := j.now[s]
	if len(list) == 0 {
		if old != nil {
			delete(j.now, s)
		}
		return
	}
	if j.now == nil {
		j.now = map[subject][]Problem{}
	}
	j.now[s] = list
	for _, p := range list {
		if !slices.Contains(old, p) {
			j.untold = append(j.untold, p)
		}
	}
}

// tell is what has not been told of yet and is still so.
func (j *journal) tell() []Problem {
	var out []Problem
	for _, p := range j.untold {
		own, shared := subject{p.Kind, p.Object, false}, subject{p.Kind, p.Object, true}
		if !slices.Contains(out, p) && (slices.Contains(j.now[own], p) || slices.Contains(j.now[shared], p)) {
			out = append(out, p)
		}
	}
	j.untold = nil
	return out
}
