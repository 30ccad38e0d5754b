package host

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Kernel is the version of a kernel.
type Kernel struct{ Major, Minor int }

// Oldest is the oldest kernel that berth runs on: close_range, pidfd with clone and waitid, openat2 and the new mount API
// all are in it, and it is the oldest that is still maintained.
var Oldest = Kernel{5, 10}

// RecursiveReadOnly is where mount_setattr with AT_RECURSIVE came.
var RecursiveReadOnly = Kernel{5, 12}

// Less says whether k is older than o.
func (k Kernel) Less(o Kernel) bool {
	return k.Major < o.Major || k.Major == o.Major && k.Minor < o.Minor
}

func (k Kernel) String() string { return fmt.Sprintf("%d.%d", k.Major, k.Minor) }

// Running is the kernel of this host.
func Running() (Kernel, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Kernel{}, os.NewSyscallError("uname", err)
	}
	return parseKernel(unix.ByteSliceToString(u.Release[:]))
}

// parseKernel reads what `uname -r` shows: "6.18.0-3-amd64".
func parseKernel(release string) (Kernel, error) {
	major, rest, ok := strings.Cut(release, ".")
	minor := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		minor = rest[:i]
	}
	a, errA := strconv.ParseUint(major, 10, 16)
	b, errB := strconv.ParseUint(minor, 10, 16)
	if !ok || errA != nil || errB != nil {
		return Kernel{}, fmt.Errorf("kernel release %q: not of the form MAJOR.MINOR", release)
	}
	return Kernel{int(a), int(b)}, nil
}

func checkKernel(k Kernel) error {
	if k.Less(Oldest) {
		return fmt.Errorf("kernel %s is too old, berth needs %s (new mount API, pidfd, openat2): boot a newer kernel", k, Oldest)
	}
	return nil
}

// Capabilities without which pods cannot be made, by number (capability.h). The others of root only go to containers.
var needed = []struct {
	name string
	bit  uint
}{
	{"CAP_CHOWN", unix.CAP_CHOWN},
	{"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE},
	{"CAP_FOWNER", unix.CAP_FOWNER},
	{"CAP_KILL", unix.CAP_KILL},
	{"CAP_SETGID", unix.CAP_SETGID},
	{"CAP_SETUID", unix.CAP_SETUID},
	{"CAP_SETPCAP", unix.CAP_SETPCAP},
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN},
	{"CAP_SYS_CHROOT", unix.CAP_SYS_CHROOT},
	{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE},
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN},
	{"CAP_MKNOD", unix.CAP_MKNOD},
}

// missingCapabilities reads the text of /proc/self/status.
func missingCapabilities(status string) ([]string, error) {
	for line := range strings.Lines(status) {
		hex, ok := strings.CutPrefix(line, "CapEff:")
		if !ok {
			continue
		}
		eff, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("CapEff of /proc/self/status: %w", err)
		}
		var missing []string
		for _, c := range needed {
			if eff&(1<<c.bit) == 0 {
				missing = append(missing, c.name)
			}
		}
		return missing, nil
	}
	return nil, errors.New("/proc/self/status has no CapEff")
}

// Check looks at kernel and privileges. It returns the kernel, since features depend on it.
func Check() (Kernel, error) {
	k, err := Running()
	if err != nil {
		return k, err
	}
	if err := checkKernel(k); err != nil {
		return k, err
	}
	if uid := os.Geteuid(); uid != 0 {
		return k, fmt.Errorf("berth serve needs root, it runs as uid %d: start it with sudo, or as a system service", uid)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return k, fmt.Errorf("capabilities: %w: mount /proc", err)
	}
	missing, err := missingCapabilities(string(status))
	if err != nil {
		return k, err
	}
	if len(missing) > 0 {
		return k, fmt.Errorf("root without %s cannot make pods: start berth outside a restricted container, or give it these capabilities",
			strings.Join(missing, ", "))
	}
	return k, nil
}

// CheckShim looks at the shim's program.
func CheckShim(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("shim %s: %w: install berth-shim beside berth, or name it with --shim", path, errors.Unwrap(err))
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0:
		return fmt.Errorf("shim %s is not an executable file: install berth-shim beside berth, or name it with --shim", path)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("shim %s has mode %04o, others can replace what runs as root: chmod it to 0755", path, info.Mode().Perm())
	}
	return nil
}
