// Package spell finds the name that somebody meant who wrote another one.
//
//	spell.Nearest("nodeport-adresses", []string{"mode", "nodePortAddresses"}) // nodePortAddresses
package spell

import (
	"slices"
	"strings"
)

// Nearest is the known name with the fewest edits from a name, where case, dashes and underscores do not count: what
// people write who know the flag. There has to be a known name.
func Nearest(name string, known []string) string {
	fold := func(s string) string { return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s)) }
	if len(name) > 64 {
		name = name[:64]
	}
	return slices.MinFunc(known, func(a, b string) int {
		return distance(fold(name), fold(a)) - distance(fold(name), fold(b))
	})
}

// distance is the number of single characters to insert, remove or replace (Levenshtein).
func distance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(prev[j]+cost, prev[j+1]+1, row[j]+1)
		}
		prev = row
	}
	return prev[len(b)]
}
