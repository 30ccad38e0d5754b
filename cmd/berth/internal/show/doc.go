// Package show writes what tools tell to people: tables, sizes, and the progress of pulls as bars on a terminal and as
// lines elsewhere. It asks nobody anything.
package show
