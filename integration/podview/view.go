package podview

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Script is a script for busybox's sh that prints what its container sees.
//
//go:embed script.sh
var Script string

// Kinds are the kinds of pods that there are views of: one that asks for nothing, one as Kubernetes' restricted Pod Security
// Standard wants it, and a privileged one.
var Kinds = []string{"plain", "restricted", "privileged"}

// changing is what another run, or another machine of the same kind, shows otherwise.
var changing = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`[0-9a-f]{64}`), "ID"},
	{regexp.MustCompile(`/berth-it\d+`), "/PARENT"},
	{regexp.MustCompile(`\b10\.91\.\d+\.\d+\b`), "ADDRESS"},
	{regexp.MustCompile(`(pipe|socket):\[\d+\]`), "$1"},
	{regexp.MustCompile(`^(limit-of-\w+ Max (?:processes|pending signals)) \d+ \d+`), "$1 N N"}, // from the size of memory
	{regexp.MustCompile(`^(mount \S+ \S+ \S+ overlay) \S+ (r[ow]),.*`), "$1 overlay $2"},
	// What is bound from the host's disk lies where the node was made.
	{regexp.MustCompile(`^(mount (?:/etc/\w+(?:\.conf)?|/dev/termination-log) \S+ \S+) .*`), "$1 HOST"},
	{regexp.MustCompile(`^(mount \S+ \S+ \S+) (devtmpfs|tmpfs) (?:udev|devtmpfs|dev) .*`), "$1 devtmpfs"},
	{regexp.MustCompile(`^(mount /dev/shm \S+ \S+ tmpfs \S+ .*?),inode64$`), "$1"},
	{regexp.MustCompile(`/exec-\d+-\d+$`), "/EXEC"},
}

// ownDevices are the devices that every container has. A privileged one has the host's as well, which are other ones on
// each machine: of those the view says only that they are there.
var ownDevices = []string{"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "termination-log", "tty", "urandom", "zero"}

// Normalise makes a view of what Script has printed: lines in order, each once, without what is of one run alone.
func Normalise(printed string) []string {
	var view []string
	for line := range strings.Lines(printed) {
		line = strings.TrimRight(line, " \n")
		for _, c := range changing {
			line = c.re.ReplaceAllString(line, c.with)
		}
		if name, ok := strings.CutPrefix(line, "device "); ok {
			name, _, _ = strings.Cut(name, " ")
			if !slices.Contains(ownDevices, name) {
				line = "device others"
			}
		}
		if line != "" {
			view = append(view, line)
		}
	}
	slices.Sort(view)
	return slices.Compact(view)
}

// Difference is a line that only one of two views has.
type Difference struct {
	Kind string // of the pod
	Only string // the runtime that shows it
	Line string
}

func (d Difference) String() string { return fmt.Sprintf("%s, only %s: %s", d.Kind, d.Only, d.Line) }

// Compare lists what only one of two views has.
func Compare(kind, name string, view []string, otherName string, other []string) []Difference {
	var all []Difference
	only := func(runtime string, view, other []string) {
		for _, line := range view {
			if !slices.Contains(other, line) {
				all = append(all, Difference{kind, runtime, line})
			}
		}
	}
	only(name, view, other)
	only(otherName, other, view)
	return all
}

// Explanation says why views differ.
type Explanation struct {
	Kinds []string
	Only  string
	Line  *regexp.Regexp // the whole line
	Why   string
}

// Explains tells whether it is about a difference.
func (e Explanation) Explains(d Difference) bool {
	return e.Only == d.Only && slices.Contains(e.Kinds, d.Kind) && e.Line.MatchString(d.Line)
}

// ParseExplanations reads explanations: a reason, indented, follows the lines that it is for, each of which is KINDS RUNTIME
// PATTERN. KINDS is kinds with commas between, or "all". What begins with # is for people.
func ParseExplanations(text string) ([]Explanation, error) {
	var done, open []Explanation
	for i, line := range strings.Split(text, "\n") {
		switch {
		case strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, " "):
			if len(open) == 0 {
				return nil, fmt.Errorf("line %d: a reason for nothing", i+1)
			}
			for _, e := range open {
				e.Why = strings.TrimSpace(line)
				done = append(done, e)
			}
			open = nil
		default:
			parts := strings.SplitN(line, " ", 3)
			if len(parts) != 3 {
				return nil, fmt.Errorf("line %d: not KINDS RUNTIME PATTERN: %q", i+1, line)
			}
			re, err := regexp.Compile(`^(?:` + parts[2] + `)$`)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", i+1, err)
			}
			kinds := Kinds
			if parts[0] != "all" {
				kinds = strings.Split(parts[0], ",")
			}
			open = append(open, Explanation{Kinds: kinds, Only: parts[1], Line: re})
		}
	}
	if len(open) > 0 {
		return nil, fmt.Errorf("no reason follows %q", open[0].Line)
	}
	return done, nil
}
