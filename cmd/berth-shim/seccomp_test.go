package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	profiles "github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// As the shim is, this program is what its own children run.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "seccomp":
			main()
			return
		case "load":
			load()
		}
	}
	os.Exit(m.Run())
}

// load loads the filter of the profile on standard input into its thread, as an init does, and waits for its end without
// a system call, since it may have none left.
func load() {
	runtime.LockOSThread()
	var profile configs.Seccomp
	if err := json.NewDecoder(os.Stdin).Decode(&profile); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(unix.Gettid())
	if _, err := seccomp.InitSeccomp(&profile); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for {
		runtime.KeepAlive(profile)
	}
}

// loaded is what the kernel has of a filter.
type loaded struct {
	program []byte
	flags   uint64
}

// loadedWith has another process load the filter of a profile, with a record to follow unless that is "", and asks the
// kernel what it is.
func loadedWith(t *testing.T, profile *configs.Seccomp, record string) loaded {
	t.Helper()
	data, err := json.Marshal(profile)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "load")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(data), os.Stderr
	cmd.Env = append(os.Environ(), "GOGC=off", "_LIBCONTAINER_LOGLEVEL=3")
	if record != "" {
		cmd.Env[len(cmd.Env)-1] += "\nseccomp:" + record
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var tid int
	if _, err := fmt.Fscan(out, &tid); err != nil {
		t.Fatal(err)
	}
	status := fmt.Sprintf("/proc/%d/task/%d/status", cmd.Process.Pid, tid)
	for deadline := time.Now().Add(time.Minute); ; {
		data, err := os.ReadFile(status)
		if err == nil && strings.Contains(string(data), "Seccomp:\t2\n") {
			break
		}
		if err != nil || time.Now().After(deadline) {
			text, _ := io.ReadAll(out)
			t.Fatalf("no filter: %v, %s", err, text)
		}
		time.Sleep(time.Millisecond)
	}
	return dump(t, tid)
}

// dump asks the kernel for the only filter of a thread.
func dump(t *testing.T, tid int) (l loaded) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(tid); err != nil {
		t.Fatalf("ptrace: %v", err)
	}
	if err := unix.PtraceInterrupt(tid); err != nil {
		t.Fatalf("ptrace: %v", err)
	}
	if _, err := unix.Wait4(tid, nil, unix.WALL, nil); err != nil {
		t.Fatalf("wait: %v", err)
	}
	defer func() { _ = unix.PtraceDetach(tid) }() // else nobody sees its end
	const sockFilter = 8                          // bytes
	filter := make([]byte, 4096*sockFilter)
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(tid), 0, uintptr(unsafe.Pointer(&filter[0])), 0, 0)
	if errno != 0 {
		t.Fatalf("filter: %v", errno)
	}
	l.program = filter[:n*sockFilter]
	metadata := make([]byte, 16)
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_METADATA, uintptr(tid), 16, uintptr(unsafe.Pointer(&metadata[0])), 0, 0); errno != 0 {
		t.Fatalf("flags: %v", errno)
	}
	l.flags = binary.NativeEndian.Uint64(metadata[8:])
	return l
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root is told filters by the kernel")
	}
}

// defaultProfile is what a container has that asks for RuntimeDefault.
func defaultProfile(t *testing.T) *specs.LinuxSeccomp {
	t.Helper()
	p, err := profiles.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}}}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func compiled(t *testing.T, p *specs.LinuxSeccomp) *configs.Seccomp {
	t.Helper()
	c, err := specconv.SetupSeccomp(p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func recordOf(t *testing.T, p *configs.Seccomp) []byte {
	t.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	record, err := makeRecord(data)
	if err != nil {
		t.Fatal(err)
	}
	return record
}

func write(t *testing.T, data []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "record")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// profilesOf are of every kind: an allow list, a deny list, arguments, codes, actions and flags.
func profilesOf(t *testing.T) map[string]*specs.LinuxSeccomp {
	one := defaultProfile(t)
	one.Architectures = nil
	enosys := defaultProfile(t)
	enosys.DefaultErrnoRet = new(uint(unix.ENOSYS))
	rule := func(action specs.LinuxSeccompAction, code *uint, args []specs.LinuxSeccompArg, names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: action, ErrnoRet: code, Args: args}
	}
	return map[string]*specs.LinuxSeccomp{
		"default": defaultProfile(t), "default, one architecture": one, "default, ENOSYS": enosys,
		"deny list": {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			rule(specs.ActErrno, new(uint(unix.EXDEV)), nil, "mkdir", "mkdirat"),
			rule(specs.ActKillProcess, nil, nil, "reboot"),
			rule(specs.ActTrap, nil, nil, "acct"),
			rule(specs.ActLog, nil, nil, "chmod"),
			rule(specs.ActTrace, new(uint(7)), nil, "chown"),
			rule(specs.ActErrno, nil, nil, "no_such_system_call"),
		}},
		"arguments": {DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64}, Syscalls: []specs.LinuxSyscall{
			rule(specs.ActErrno, nil, []specs.LinuxSeccompArg{{Index: 0, Value: 0xf0, ValueTwo: 0x30, Op: specs.OpMaskedEqual}, {Index: 2, Value: 1 << 40, Op: specs.OpGreaterThan}}, "personality", "clone"),
			rule(specs.ActErrno, nil, []specs.LinuxSeccompArg{{Index: 0, Value: 40, Op: specs.OpEqualTo}, {Index: 0, Value: 41, Op: specs.OpEqualTo}}, "socket"), // libcontainer: either
			rule(specs.ActErrno, new(uint(1)), []specs.LinuxSeccompArg{{Index: 1, Value: 5, Op: specs.OpNotEqual}}, "ioctl"),
		}},
		"flags": {DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, "SECCOMP_FILTER_FLAG_TSYNC"}, Syscalls: []specs.LinuxSyscall{
			rule(specs.ActErrno, nil, nil, "mkdir"),
		}},
		"no rules": {DefaultAction: specs.ActAllow},
	}
}

// The filter that the kernel has is the same to the byte, whether its program comes from a record or from libseccomp.
func TestCVE_2023_2431_RecordedFilterIsTheSame(t *testing.T) {
	needsRoot(t)
	for name, spec := range profilesOf(t) {
		t.Run(name, func(t *testing.T) {
			p := compiled(t, spec)
			record := recordOf(t, p)
			want, got := loadedWith(t, p, ""), loadedWith(t, p, write(t, record))
			if got.flags != want.flags {
				t.Errorf("flags %#x, not %#x", got.flags, want.flags)
			}
			if len(spec.Architectures) > 1 {
				// What libcontainer puts before it, for unknown calls, has its architectures in any order.
				i := commonTail(t, want.program, record)
				if len(got.program) != len(want.program) {
					t.Fatalf("%d bytes, not %d", len(got.program), len(want.program))
				}
				got.program, want.program = got.program[i:], want.program[i:]
			}
			if len(want.program) == 0 || !bytes.Equal(got.program, want.program) {
				t.Errorf("%d bytes with a record, %d without, or other ones", len(got.program), len(want.program))
			}
		})
	}
}

// commonTail is where in a loaded program that begins with which the record ends.
func commonTail(t *testing.T, program, record []byte) int {
	t.Helper()
	i := len(program)
	for j := len(record); i >= 8 && j >= 8 && bytes.Equal(program[i-8:i], record[j-8:j]); i, j = i-8, j-8 {
	}
	if len(program)-i < len(program)*9/10 {
		t.Fatalf("the record's program is not the one that libseccomp makes: %d of %d bytes", len(program)-i, len(program))
	}
	return i
}

// A program is taken from the record of the very same calls, and from no other.
func TestRecordsThatDoNotFit(t *testing.T) {
	needsRoot(t)
	deny := func(names ...string) *configs.Seccomp {
		s := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
		for _, n := range names {
			s.Syscalls = append(s.Syscalls, specs.LinuxSyscall{Names: []string{n}, Action: specs.ActErrno})
		}
		return compiled(t, s)
	}
	p := deny("mkdir", "rmdir", "acct")
	want := loadedWith(t, p, "")
	own := recordOf(t, p)
	changed := func(at int) []byte {
		r := slices.Clone(own)
		r[at] ^= 1
		return r
	}
	for name, record := range map[string][]byte{
		"empty":                      {},
		"less than a call":           own[:10],
		"nothing but the first call": own[:24],
		"half":                       own[:len(own)/2/24*24],
		"another default action":     changed(4),
		"another layout":             changed(0),
		"a call fewer":               recordOf(t, deny("mkdir", "rmdir")),
		"a call more":                recordOf(t, deny("mkdir", "rmdir", "acct", "reboot")),
		"another order":              recordOf(t, deny("mkdir", "acct", "rmdir")),
		"another profile":            recordOf(t, compiled(t, defaultProfile(t))),
		"too large":                  append(slices.Clone(own), make([]byte, 1<<20)...),
	} {
		t.Run(name, func(t *testing.T) {
			if got := loadedWith(t, p, write(t, record)); !bytes.Equal(got.program, want.program) {
				t.Error("the filter is not that of the profile")
			}
		})
	}
	if got := loadedWith(t, p, filepath.Join(t.TempDir(), "none")); !bytes.Equal(got.program, want.program) {
		t.Error("no file: the filter is not that of the profile")
	}

	// That records are followed at all: this one has another program behind the same calls.
	ret := make([]byte, 8)
	binary.NativeEndian.PutUint16(ret, unix.BPF_RET|unix.BPF_K)
	binary.NativeEndian.PutUint32(ret[4:], unix.SECCOMP_RET_ALLOW)
	other := append(slices.Clone(own[:len(own)-len(want.program)]), ret...)
	if got := loadedWith(t, p, write(t, other)); !bytes.Equal(got.program, ret) {
		t.Errorf("a record of the same calls is not followed: %d bytes", len(got.program))
	}
}

// What libcontainer refuses has no record, and the one that makes it neither.
func TestProfilesWithoutRecord(t *testing.T) {
	dir := t.TempDir()
	for name, p := range map[string]*configs.Seccomp{
		"notify on write":        {DefaultAction: configs.Allow, Syscalls: []*configs.Syscall{{Name: "write", Action: configs.Notify}}},
		"unknown default action": {DefaultAction: 99},
		"unknown architecture":   {DefaultAction: configs.Allow, Architectures: []string{"abacus"}},
	} {
		if err := linkRecord(dir, t.TempDir(), p); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestRecordsAreSharedAndBounded(t *testing.T) {
	dir := t.TempDir()
	abandoned := filepath.Join(dir, ".tmp-1")
	if err := os.WriteFile(abandoned, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(abandoned, old, old); err != nil {
		t.Fatal(err)
	}
	profile := func(code int) *configs.Seccomp {
		return &configs.Seccomp{DefaultAction: configs.Errno, DefaultErrnoRet: new(uint(code)), Syscalls: []*configs.Syscall{{Name: "read", Action: configs.Allow}}}
	}
	first := t.TempDir()
	if err := linkRecord(dir, first, profile(1)); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 2 * maxRecords { // each twice, at once
		all.Go(func() {
			if err := linkRecord(dir, t.TempDir(), profile(2+i/2)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) == 0 || len(files) > maxRecords { // two that make room at once may make more than is needed
		t.Errorf("%d files, %v", len(files), err)
	}
	if _, err := os.Stat(abandoned); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was left unfinished is still there: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(first, recordName)); err != nil || len(data) == 0 {
		t.Errorf("a container has lost its record with the directory's: %v", err)
	}
	var same []os.FileInfo
	for range 2 {
		state := t.TempDir()
		if err := linkRecord(dir, state, profile(1+maxRecords)); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(state, recordName))
		if err != nil {
			t.Fatal(err)
		}
		same = append(same, info)
	}
	if !os.SameFile(same[0], same[1]) {
		t.Error("it has been made once more")
	}
}

// Whoever makes room may remove any record at any time, also one that was just made.
func TestARecordThatGoesMeanwhile(t *testing.T) {
	dir := t.TempDir()
	profile := &configs.Seccomp{DefaultAction: configs.Errno, Syscalls: []*configs.Syscall{{Name: "read", Action: configs.Allow}}}
	if err := linkRecord(dir, t.TempDir(), profile); err != nil {
		t.Fatal(err)
	}
	shared, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(shared) != 1 {
		t.Fatalf("%v, %v", shared, err)
	}
	stop := make(chan struct{})
	var others sync.WaitGroup
	defer others.Wait()
	defer close(stop)
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Remove(shared[0])
			}
		}
	})
	for range 30 {
		state := t.TempDir()
		if err := linkRecord(dir, state, profile); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(filepath.Join(state, recordName)); err != nil || len(data) == 0 {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
	}
}
