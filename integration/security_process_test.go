//go:build integration

package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// readStatus reads the fields of /proc/PID/status, with blanks between the words of a value.
func readStatus(t testing.TB, pid int) map[string]string {
	t.Helper()
	fields, err := statusOf(pid)
	must(t, err)
	return fields
}

// statusOf is readStatus of a process that may be gone.
func statusOf(pid int) (map[string]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	fields := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.Join(strings.Fields(value), " ")
	}
	return fields, err
}

// residentKiB is the memory of a process now; from here on peakKiB tells its highest.
func residentKiB(t testing.TB, pid int) int {
	t.Helper()
	must(t, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0))
	return statusKiB(t, pid, "VmRSS")
}

func peakKiB(t testing.TB, pid int) int {
	t.Helper()
	return statusKiB(t, pid, "VmHWM")
}

func statusKiB(t testing.TB, pid int, field string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(readStatus(t, pid)[field], " kB"))
	must(t, err)
	return n
}

// cgroupsOf are the cgroups of a process by controller, "" for v2. A hierarchy without controllers counts, too.
func cgroupsOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	must(t, err)
	paths := map[string]string{}
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if f[1] == "name=systemd" || f[1] == "" && len(paths) > 0 {
			continue // hierarchies that limit nothing: berth may use them or not
		}
		paths[f[1]] = f[2]
	}
	return paths
}

// execPID runs a process in a container until the test ends, and returns its pid.
func (s *security) execPID(t *testing.T, id string) int {
	t.Helper()
	s.mu.Lock()
	s.count++
	seconds := strconv.Itoa(1_000_000 + s.count)
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = s.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", seconds}})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	var pid int
	must(t, lab.Eventually(t.Context(), 20*time.Second, "exec in "+id, func(context.Context) error {
		select {
		case <-ended:
			return fmt.Errorf("it has ended")
		default:
		}
		for _, p := range processes(t) {
			if p.cmdline == "sleep "+seconds {
				pid = p.pid
				return nil
			}
		}
		return fmt.Errorf("no process sleeps for %s s", seconds)
	}))
	return pid
}

type processEntry struct {
	pid, parent int
	cmdline     string
}

// processes lists what runs on the machine.
func processes(t *testing.T) []processEntry {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	var list []processEntry
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		stat, err2 := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil || err2 != nil {
			continue // it has ended
		}
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		parent, _ := strconv.Atoi(f[1])
		list = append(list, processEntry{pid, parent, strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))})
	}
	return list
}

// theProcess is the one process that runs with that command line, as a child of another if that is not 0.
func theProcess(t *testing.T, cmdline string, parent int) int {
	t.Helper()
	var found []int
	for _, p := range processes(t) {
		if p.cmdline == cmdline && (parent == 0 || p.parent == parent) {
			found = append(found, p.pid)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d processes run %q", len(found), cmdline)
	}
	return found[0]
}

func (s *security) shim(t *testing.T, p *securityPod) int {
	t.Helper()
	cmdline := "berth-shim shim " + filepath.Join(s.Run(), "pods", p.id) + " lean"
	if p.cfg.Linux.SecurityContext.NamespaceOptions.Pid == runtimeapi.NamespaceMode_POD {
		cmdline += " shared-pid"
	}
	return theProcess(t, cmdline, 0)
}

func (s *security) execServer(t *testing.T) int {
	t.Helper()
	return theProcess(t, "berth-shim exec", s.Berth.PID())
}

// namespaceKinds are all that a process is in.
var namespaceKinds = []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"}

func namespaceOf(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return strconv.FormatUint(st.Ino, 10)
}

// namespaces tells of each kind whether a process is in the node's, its pod's, another process's, or its own.
func (s *security) namespaces(t *testing.T, pid int, p *securityPod, other int) map[string]string {
	t.Helper()
	where := map[string]string{}
	for _, kind := range namespaceKinds {
		is := namespaceOf(t, fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		where[kind] = "own"
		if other > 0 && is == namespaceOf(t, fmt.Sprintf("/proc/%d/ns/%s", other, kind)) {
			where[kind] = "init's"
		}
		if p != nil {
			pin := filepath.Join(s.Run(), "pods", p.id, "ns", kind)
			if _, err := os.Stat(pin); err == nil && is == namespaceOf(t, pin) {
				where[kind] = "pod"
			}
		}
		if is == namespaceOf(t, "/proc/self/ns/"+kind) {
			where[kind] = "host"
		}
	}
	return where
}

var inode = regexp.MustCompile(`:\[[0-9]+\]$`)

// descriptors tells what each open file of a process is.
func (s *security) descriptors(t *testing.T, pid int) map[int]string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	must(t, err)
	open := map[int]string{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		target, err := os.Readlink(path)
		if err != nil {
			continue // closed meanwhile
		}
		n, err := strconv.Atoi(e.Name())
		must(t, err)
		open[n] = s.kindOfFile(path, target)
	}
	return open
}

var longID = regexp.MustCompile(`[0-9a-f]{64}`)

func (s *security) kindOfFile(path, target string) string {
	var st, null unix.Stat_t
	if unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3) {
		if unix.Stat("/dev/null", &null) == nil && null.Dev == st.Dev && null.Ino == st.Ino {
			return "the host's /dev/null"
		}
		return "own /dev/null"
	}
	target = inode.ReplaceAllString(target, "")
	if rest, ok := strings.CutPrefix(target, s.Dir+"/"); ok {
		return longID.ReplaceAllString(rest, "ID")
	}
	return target
}

// onlyFiles fails the test for each open file of a process that is not on the list.
func (s *security) onlyFiles(t *testing.T, who string, pid int, allowed ...string) {
	t.Helper()
	for n, is := range s.descriptors(t, pid) {
		if !slices.ContainsFunc(allowed, func(a string) bool {
			ok, err := filepath.Match(a, is)
			return is == a || ok && err == nil
		}) {
			t.Errorf("%s, process %d: descriptor %d is %q", who, pid, n, is)
		}
	}
}

// posture is what counts of a process, to be compared as a whole.
type posture map[string]string

// want fails the test for every field that is not as it should be.
func (got posture) want(t *testing.T, who string, want posture) {
	t.Helper()
	for field, value := range want {
		if got[field] != value {
			t.Errorf("%s: %s is %q, want %q", who, field, got[field], value)
		}
	}
	for field := range got {
		if _, ok := want[field]; !ok {
			t.Errorf("%s: nothing is expected of %s, which is %q", who, field, got[field])
		}
	}
}

// with is a copy with some fields changed.
func (got posture) with(change posture) posture {
	all := posture{}
	for _, from := range []posture{got, change} {
		for k, v := range from {
			all[k] = v
		}
	}
	return all
}

func (s *security) posture(t *testing.T, pid int, p *securityPod, init int) posture {
	t.Helper()
	got := posture{}
	status := readStatus(t, pid)
	for _, field := range []string{"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn", "Umask"} {
		got[field] = status[field]
	}
	for kind, where := range s.namespaces(t, pid, p, init) {
		got["namespace "+kind] = where
	}
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	must(t, err)
	got["oom_score_adj"] = strings.TrimSpace(string(score))
	got["cgroup"] = cgroupPosture(t, pid, s.Cgroup())
	var root, host unix.Stat_t
	must(t, unix.Stat(fmt.Sprintf("/proc/%d/root", pid), &root))
	must(t, unix.Stat("/", &host))
	got["root"] = "own"
	if root.Dev == host.Dev && root.Ino == host.Ino {
		got["root"] = "host"
	}
	return got
}

// cgroupPosture is where a process is, the same in all hierarchies or all that differ, without ids and the part above.
func cgroupPosture(t *testing.T, pid int, above string) string {
	t.Helper()
	paths := map[string]bool{}
	for _, path := range cgroupsOf(t, pid) {
		path = longID.ReplaceAllString(strings.TrimPrefix(path, above), "ID")
		if i := strings.Index(path, "/exec-"); i > 0 {
			path = path[:i] // on v1 an exec has a cgroup of its own in one hierarchy
		}
		paths[path] = true
	}
	return strings.Join(slices.Sorted(maps.Keys(paths)), " ")
}
