package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestKernelVersions(t *testing.T) {
	for release, want := range map[string]Kernel{
		"6.18.0-3-amd64": {6, 18}, "5.10": {5, 10}, "5.10.0": {5, 10}, "6.1-rc4": {6, 1}, "5.15.167.4-microsoft-standard-WSL2": {5, 15}, "10.0+": {10, 0},
	} {
		if got, err := parseKernel(release); err != nil || got != want {
			t.Errorf("%q: %v %v", release, got, err)
		}
	}
	for _, release := range []string{"", "6", "x.y", "6.", ".1", "-1.2", "99999999999.1", "6.x"} {
		if got, err := parseKernel(release); err == nil {
			t.Errorf("%q: %v", release, got)
		}
	}
	if k, err := Running(); err != nil || k.Major < 3 {
		t.Errorf("this host: %v %v", k, err)
	}
}

func TestOldKernelIsRefusedWithARemedy(t *testing.T) {
	for _, k := range []Kernel{{4, 19}, {5, 9}} {
		err := checkKernel(k)
		if err == nil || !strings.Contains(err.Error(), "kernel "+k.String()) || !strings.Contains(err.Error(), "5.10") || !strings.Contains(err.Error(), "boot a newer kernel") {
			t.Errorf("%v: %v", k, err)
		}
	}
	for _, k := range []Kernel{{5, 10}, {5, 15}, {6, 0}} {
		if err := checkKernel(k); err != nil {
			t.Errorf("%v: %v", k, err)
		}
	}
}

func TestMissingCapabilitiesAreNamed(t *testing.T) {
	all := "Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t000001ffffffffff\n"
	if got, err := missingCapabilities(all); err != nil || len(got) != 0 {
		t.Errorf("%v %v", got, err)
	}
	without := fmt.Sprintf("CapEff:\t%016x\n", uint64(0x1ffffffffff)&^(1<<unix.CAP_SYS_ADMIN)&^(1<<unix.CAP_NET_ADMIN))
	got, err := missingCapabilities(without)
	if err != nil || strings.Join(got, ",") != "CAP_NET_ADMIN,CAP_SYS_ADMIN" {
		t.Errorf("%v %v", got, err)
	}
	for _, bad := range []string{"", "Name: x\n", "CapEff:\tzz\n"} {
		if _, err := missingCapabilities(bad); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
}

func TestSecondDaemonIsToldThePIDOfTheFirst(t *testing.T) {
	root, run := filepath.Join(t.TempDir(), "root"), filepath.Join(t.TempDir(), "run")
	first, err := Claim(root, run)
	if err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprintf("(pid %d)", os.Getpid())
	for _, roots := range [][2]string{{root, run}, {root, t.TempDir()}, {t.TempDir(), run}} {
		if _, err := Claim(roots[0], roots[1]); err == nil || !strings.Contains(err.Error(), pid) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: %v, want %s in one line", roots, err, pid)
		}
	}
	if err := first.Release(); err != nil {
		t.Fatal(err)
	}
	second, err := Claim(root, run)
	if err != nil {
		t.Fatalf("after the first has gone: %v", err)
	}
	if err := second.Release(); err != nil {
		t.Error(err)
	}
}

// A daemon that is killed while it starts a child leaves its lock with that child, until it executes its program.
func TestLockOfADeadDaemonIsWaitedFor(t *testing.T) {
	root, run := t.TempDir(), t.TempDir()
	first, err := Claim(root, run)
	if err != nil {
		t.Fatal(err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	for _, f := range first.files {
		if _, err := f.WriteAt(fmt.Appendf(nil, "%-10d\n", dead.Process.Pid), 0); err != nil {
			t.Fatal(err)
		}
	}
	released := make(chan error, 1)
	time.AfterFunc(100*time.Millisecond, func() { released <- first.Release() })
	second, err := Claim(root, run)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-released, second.Release()); err != nil {
		t.Error(err)
	}
}

// Whoever kills a daemon and starts another at once, as a supervisor does, is not told that the first is still there.
func TestDying(t *testing.T) {
	for stat, want := range map[string]bool{
		"7 (berth) S 1 7 7 0 -1 4194560 5": false,
		"7 (a) Z) S 1 7 7 0 -1 4194560 5":  false,
		"7 (berth) Z 1 7 7 0 -1 4194560 5": true,
		"7 (berth) X 1 7 7 0 -1 4194560 5": true,
		"7 (berth) R 1 7 7 0 -1 4194564 5": true, // PF_EXITING
		"7 (berth) S 1 7":                  false,
		"":                                 false,
	} {
		if got := isExiting(stat); got != want {
			t.Errorf("%q: %v", stat, got)
		}
	}
	for status, want := range map[string]bool{
		"Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000004000\n": false,
		"Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n": true,
		"Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n": true,
		"SigBlk:\t0000000000000100\nSigPnd:\tzz\n":                         false,
	} {
		if got := isKilled(status); got != want {
			t.Errorf("%q: %v", status, got)
		}
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if dying(cmd.Process.Pid) {
		t.Error("a process that lives is taken for dead")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if !dying(cmd.Process.Pid) {
		t.Error("a process that was killed is taken for alive")
	}
	_ = cmd.Wait()
	if !dying(cmd.Process.Pid) {
		t.Error("a process that is gone is taken for alive")
	}
}

func TestHolderOfAStrangeLockFile(t *testing.T) {
	for content, want := range map[string]string{"12\n": "12", "": "unknown", "x": "unknown", strings.Repeat("9", 100): "unknown", "-1": "unknown"} {
		f, err := os.CreateTemp(t.TempDir(), "lock")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(content); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Seek(0, 0); err != nil {
			t.Fatal(err)
		}
		if got := holder(f); got != want {
			t.Errorf("%.20q: %q", content, got)
		}
		_ = f.Close()
	}
}

// CVE-2021-41103: what is below a root holds setuid files of images.
func TestCVE_2021_41103_RootsAreClosedToOthers(t *testing.T) {
	dir := t.TempDir()
	root, run := filepath.Join(dir, "deep", "root"), filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(run, 0o777); err != nil {
		t.Fatal(err)
	}
	old := unix.Umask(0)
	defer unix.Umask(old)
	l, err := Claim(root, run)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Release() }()
	for path, want := range map[string]os.FileMode{root: 0o700, run: 0o711, filepath.Join(root, "lock"): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s: %04o, want %04o", path, info.Mode().Perm(), want)
		}
	}
}

func TestUnusableRootsAreRefusedInOneLineWithARemedy(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(dir, "linked")
	if err := os.Mkdir(linked, 0o700); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(precious, filepath.Join(linked, "lock")); err != nil {
		t.Fatal(err)
	}
	for root, want := range map[string]string{
		file:                       "not a directory",
		filepath.Join(file, "sub"): "not a directory",
		"/proc/berth":              "no such file or directory",
		linked:                     "too many levels of symbolic links",
	} {
		_, err := Claim(root, filepath.Join(dir, "run"))
		if err == nil || !strings.Contains(err.Error(), "root "+root+": "+want) || !strings.Contains(err.Error(), "choose another with --root") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", root, err, want)
		}
	}
	if data, err := os.ReadFile(precious); err != nil || string(data) != "data" {
		t.Errorf("the file behind a link was touched: %q %v", data, err)
	}
	// The claim on the first is dropped when the second cannot be had.
	good := filepath.Join(dir, "good")
	if _, err := Claim(good, file); err == nil || !strings.Contains(err.Error(), "--run") {
		t.Errorf("%v", err)
	}
	l, err := Claim(good, filepath.Join(dir, "run"))
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Release()
}

func TestReadOnlyRootIsRefusedWithARemedy(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, "size=64k"); err != nil {
		if errors.Is(err, unix.EPERM) {
			t.Skip("may not mount here")
		}
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	for _, root := range []string{dir, filepath.Join(dir, "sub")} {
		if _, err := Claim(root, t.TempDir()); err == nil || !strings.Contains(err.Error(), "read-only file system: make it writable, or choose another with --root") {
			t.Errorf("%s: %v", root, err)
		}
	}
}

func TestShimProgram(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := CheckShim(file("good", 0o755)); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "no such file or directory: install berth-shim beside berth",
		file("plain", 0o644):       "not an executable file",
		dir:                        "not an executable file",
		file("open", 0o777):        "chmod it to 0755",
	} {
		if err := CheckShim(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

func FuzzKernel(f *testing.F) {
	for _, s := range []string{"6.18.0", "", ".", "6.", "5.10-rc1", "\x00", "99999999999999999999.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if k, err := parseKernel(s); err == nil && (k.Major < 0 || k.Minor < 0 || !strings.HasPrefix(strings.TrimLeft(s, "0+"), strings.TrimLeft(fmt.Sprint(k.Major), "0"))) {
			t.Errorf("%q: %v", s, k)
		}
	})
}
