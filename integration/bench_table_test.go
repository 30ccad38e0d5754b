//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
)

// numberOr is what a variable of the environment says.
func numberOr(t testing.TB, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no number above 0", name, text)
	}
	return n
}

// numbers are those of a variable of the environment; nil if it is not set.
func numbers(t testing.TB, name string) []int {
	t.Helper()
	var all []int
	for _, s := range strings.Fields(os.Getenv(name)) {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("%s: %q is no number above 0", name, s)
		}
		all = append(all, n)
	}
	return all
}

// benchTable is a table of figures in Markdown.
type benchTable struct {
	head []string
	rows [][]string
}

func (t *benchTable) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *benchTable) String() string {
	line := func(cells []string) string { return "| " + strings.Join(cells, " | ") + " |\n" }
	var b strings.Builder
	b.WriteString(line(t.head))
	b.WriteString(strings.Repeat("|---", len(t.head)) + "|\n")
	for _, cells := range t.rows {
		b.WriteString(line(cells))
	}
	return b.String()
}

// publish prints a table, with when, where and by what command it was made, and leaves it in bin/, too.
func (t *benchTable) publish(b testing.TB, name, command string) {
	b.Helper()
	root, err := lab.RepoRoot()
	must(b, err)
	text := fmt.Sprintf("%s, `%s`, %s:\n\n%s", time.Now().UTC().Format("2 January 2006, 15:04 UTC"), command, machine(b), t)
	file := filepath.Join(root, "bin", name)
	must(b, os.WriteFile(file, []byte(text), 0o644))
	fmt.Printf("\n%s\nThis is in %s, too.\n", text, file)
}

// machine is on what something is measured, and what else runs there.
func machine(t testing.TB) string {
	t.Helper()
	read := func(file, pattern string) string {
		text, err := os.ReadFile(file)
		must(t, err)
		if m := regexp.MustCompile("(?m)" + pattern).FindSubmatch(text); m != nil {
			return string(m[1])
		}
		return "unknown"
	}
	var info unix.Sysinfo_t
	must(t, unix.Sysinfo(&info))
	var system unix.Utsname
	must(t, unix.Uname(&system))
	hierarchy := "cgroup v1"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		hierarchy = "cgroup v2"
	}
	return fmt.Sprintf("%d processors (%s), %d GiB, Linux %s, %s, load average %s", runtime.NumCPU(), read("/proc/cpuinfo", `^model name\s*: (.*)$`),
		(uint64(info.Totalram)*uint64(info.Unit)+1<<29)>>30, unix.ByteSliceToString(system.Release[:]), hierarchy, read("/proc/loadavg", `^(\S+)`))
}

// showTime has three digits.
func showTime(d time.Duration) string {
	switch ms := float64(d.Microseconds()) / 1000; {
	case ms < 10:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	default:
		return fmt.Sprintf("%.2f s", ms/1000)
	}
}

func showMiB(kib float64) string {
	if kib < 10<<10 {
		return fmt.Sprintf("%.2f MiB", kib/1024)
	}
	return fmt.Sprintf("%.1f MiB", kib/1024)
}
