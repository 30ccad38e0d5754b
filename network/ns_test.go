package network

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces and mounts")
	}
}

// mounts lists what is mounted below the directories of this test: others may mount things at the same time.
func mounts(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var ours strings.Builder
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, " "+filepath.Dir(t.TempDir())+"/") {
			ours.WriteString(line)
		}
	}
	return ours.String()
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(data)), " ")
}

// pinned makes namespaces for a test and says where they are.
func pinned(t *testing.T, s NamespaceSet) NamespaceSet {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	s.Net, s.IPC, s.UTS = dir+"/net", dir+"/ipc", dir+"/uts"
	t.Cleanup(func() {
		if err := Unpin(s.Net, s.IPC, s.UTS); err != nil {
			t.Error(err)
		}
	})
	if err := Pin(s); err != nil {
		t.Fatal(err)
	}
	return s
}

// inside reads a file in all three namespaces.
func (s NamespaceSet) inside(t *testing.T, file string) string {
	t.Helper()
	var data []byte
	err := thread.Throwaway(func() error {
		for _, n := range s.namespaces() {
			f, err := os.Open(n.path)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := unix.Setns(int(f.Fd()), n.flag); err != nil {
				return err
			}
		}
		var err error
		data, err = os.ReadFile(file)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(data)), " ")
}

// atHome waits until every thread of this process is in the namespaces of the first one: thrown away threads take a
// moment to end.
func atHome(t *testing.T) {
	t.Helper()
	var foreign string
	for range 200 {
		foreign = ""
		for _, n := range []string{"net", "ipc", "uts"} {
			home, err := os.Readlink("/proc/self/ns/" + n)
			if err != nil {
				t.Fatal(err)
			}
			tasks, err := filepath.Glob("/proc/self/task/*/ns/" + n)
			if err != nil {
				t.Fatal(err)
			}
			for _, task := range tasks {
				if l, err := os.Readlink(task); err == nil && l != home {
					foreign = task
				}
			}
		}
		if foreign == "" {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("a thread stays in a foreign namespace: %s", foreign)
}

func TestPinLeavesNothing(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	s := NamespaceSet{Net: dir + "/net", IPC: dir + "/ipc", UTS: dir + "/uts", Hostname: "x"}
	if err := Pin(s); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(mounts(t), "\n"); n != 3 {
		t.Fatalf("%d mounts, want 3:\n%s", n, mounts(t))
	}
	for _, n := range s.namespaces() {
		home, _ := os.Stat("/proc/self/ns/" + n.file)
		st, err := os.Stat(n.path)
		if err != nil || !Pinned(n.path) {
			t.Fatalf("%s: not pinned: %v", n.path, err)
		}
		if os.SameFile(home, st) {
			t.Errorf("%s is the namespace of the test", n.path)
		}
	}
	if err := Unpin(s.Net, s.IPC, s.UTS); err != nil {
		t.Fatal(err)
	}
	if left := mounts(t); left != "" {
		t.Errorf("mounts left:\n%s", left)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("files left: %v", left)
	}
	atHome(t)
	if err := Unpin(s.Net, s.IPC, s.UTS, "", dir+"/never/was"); err != nil {
		t.Errorf("second Unpin: %v", err)
	}
}

func TestPinnedFileIsPrivate(t *testing.T) {
	needRoot(t)
	file := filepath.Join(t.TempDir(), "net")
	if err := Pin(NamespaceSet{Net: file}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(file)
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("file below the pin: %v, %v", st.Mode(), err)
	}
	if Pinned(file) {
		t.Error("Pinned after unmounting")
	}
	if err := Unpin(file); err != nil {
		t.Errorf("a file without a mount, as after a reboot: %v", err)
	}
}

func TestSettingsApplyOnlyInside(t *testing.T) {
	needRoot(t)
	files := map[string]string{
		"/proc/sys/kernel/hostname":                     "web-0",
		"/proc/sys/net/ipv4/ip_unprivileged_port_start": "7",
		"/proc/sys/net/ipv4/ping_group_range":           "0 5",
		"/proc/sys/kernel/shm_rmid_forced":              "1",
		"/proc/sys/fs/mqueue/msg_max":                   "13",
		"/proc/sys/kernel/domainname":                   "example.org",
		"/proc/sys/net/ipv4/tcp_fin_timeout":            "41",
	}
	before := map[string]string{}
	for f, want := range files {
		if before[f] = read(t, f); before[f] == want {
			t.Fatalf("%s is %q on this machine already", f, want)
		}
	}
	s := pinned(t, NamespaceSet{Hostname: "web-0", Sysctls: map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "7",
		"net/ipv4/ping_group_range":           "0\t5",
		"kernel.shm_rmid_forced":              "1",
		"fs.mqueue.msg_max":                   "13",
		"kernel.domainname":                   "example.org",
		"net.ipv4.tcp_fin_timeout":            "41",
	}})
	for f, want := range files {
		if got := s.inside(t, f); got != want {
			t.Errorf("%s inside: %q, want %q", f, got, want)
		}
		if got := read(t, f); got != before[f] {
			t.Errorf("%s outside: %q, was %q", f, got, before[f])
		}
	}
	atHome(t)
}

func TestPinSetsLoopbackUp(t *testing.T) {
	s := pinned(t, NamespaceSet{})
	err := InNamespaces([]string{s.Net}, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		if lo := links[0].Attrs(); lo.Name != "lo" || lo.RawFlags&unix.IFF_UP == 0 {
			t.Errorf("%s is not up", lo.Name)
		}
		addrs, err := netlink.AddrList(links[0], netlink.FAMILY_V4)
		if err == nil && (len(addrs) != 1 || addrs[0].IP.String() != "127.0.0.1") {
			t.Errorf("addresses of lo: %v", addrs)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestPinUndoesOnError(t *testing.T) {
	needRoot(t)
	for name, s := range map[string]struct {
		set  NamespaceSet
		want error
	}{
		"sysctl refused by the kernel":   {NamespaceSet{Sysctls: map[string]string{"net.ipv4.ip_forward": "maybe"}}, errdefs.ErrInvalidArgument},
		"sysctl that the kernel lacks":   {NamespaceSet{Sysctls: map[string]string{"net.ipv4.no_such": "1"}}, errdefs.ErrInvalidArgument},
		"third pin has no directory":     {NamespaceSet{UTS: "/nonexistent/uts"}, os.ErrNotExist},
		"third pin exists":               {NamespaceSet{UTS: "exists"}, errdefs.ErrAlreadyExists},
		"third pin is a dangling link":   {NamespaceSet{UTS: "link"}, errdefs.ErrAlreadyExists},
		"hostname that is too long":      {NamespaceSet{Hostname: strings.Repeat("x", 65)}, errdefs.ErrInvalidArgument},
		"hostname with a newline":        {NamespaceSet{Hostname: "a\nb"}, errdefs.ErrInvalidArgument},
		"relative path, in no directory": {NamespaceSet{UTS: "./uts"}, errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s.set.Net, s.set.IPC = dir+"/net", dir+"/ipc"
			switch s.set.UTS {
			case "":
				s.set.UTS = dir + "/uts"
			case "exists":
				s.set.UTS = dir + "/exists"
				if err := os.WriteFile(s.set.UTS, []byte("precious"), 0o600); err != nil {
					t.Fatal(err)
				}
			case "link":
				s.set.UTS = dir + "/link"
				if err := os.Symlink(dir+"/elsewhere", s.set.UTS); err != nil {
					t.Fatal(err)
				}
			}
			if err := Pin(s.set); !errors.Is(err, s.want) {
				t.Errorf("%v, want %v", err, s.want)
			}
			if left := mounts(t); left != "" {
				t.Errorf("mounts left:\n%s", left)
			}
			left, _ := os.ReadDir(dir)
			for _, f := range left {
				if f.Name() != "exists" && f.Name() != "link" {
					t.Errorf("left: %s", f.Name())
				}
			}
			atHome(t)
		})
	}
}

func TestPinWithoutNamespacesIsNothing(t *testing.T) {
	if err := Pin(NamespaceSet{}); err != nil {
		t.Error(err)
	}
}

// The host's settings must not be reachable through a pod that uses the host's namespaces.
func TestCVE_2022_0532_SysctlsOfTheHost(t *testing.T) {
	host, _ := os.Hostname()
	for name, s := range map[string]NamespaceSet{
		"hostname without uts": {Net: "/x/net", Hostname: "evil"},
		"net without net":      {IPC: "/x/ipc", Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}},
		"net, nothing made":    {Sysctls: map[string]string{"net/ipv4/ip_forward": "1"}},
		"shm without ipc":      {Net: "/x/net", Sysctls: map[string]string{"kernel.shmmax": "1"}},
		"mqueue without ipc":   {Net: "/x/net", Sysctls: map[string]string{"fs.mqueue.msg_max": "1"}},
		"domain without uts":   {Net: "/x/net", Sysctls: map[string]string{"kernel.domainname": "x"}},
		"core_pattern":         {Net: "/x/net", IPC: "/x/ipc", UTS: "/x/uts", Sysctls: map[string]string{"kernel/core_pattern": "|/x"}},
		"vm":                   {Net: "/x/net", IPC: "/x/ipc", Sysctls: map[string]string{"vm.overcommit_memory": "1"}},
		"escape":               {Net: "/x/net", Sysctls: map[string]string{"net/../kernel/core_pattern": "|/x"}},
		"escape, dotted":       {Net: "/x/net", Sysctls: map[string]string{"net.//.kernel.core_pattern": "|/x"}},
		"ipc by prefix":        {IPC: "/x/ipc", Sysctls: map[string]string{"kernel.shmmax_x": "1"}},
		"hostname as a sysctl": {UTS: "/x/uts", Sysctls: map[string]string{"kernel.hostname": "x"}},
	} {
		if err := Pin(s); name != "net, nothing made" && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
		_, err := parseSysctls(s.Sysctls, s.Net != "", s.IPC != "", s.UTS != "")
		if s.Sysctls != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if now, _ := os.Hostname(); now != host {
		t.Errorf("hostname is %q now", now)
	}
}

func TestCVE_2022_0811_OneValueOnly(t *testing.T) {
	for name, value := range map[string]string{
		"newline": "1\nkernel.core_pattern=x", "nul": "1\x00", "return": "1\r2", "empty": "",
	} {
		_, err := parseSysctls(map[string]string{"kernel.shmmax": value}, true, true, true)
		if !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	needRoot(t)
	before := read(t, "/proc/sys/kernel/core_pattern")
	err := Pin(NamespaceSet{IPC: t.TempDir() + "/ipc", Sysctls: map[string]string{"kernel.shmmax": "1+kernel.core_pattern=x"}})
	if !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v", err)
	}
	if after := read(t, "/proc/sys/kernel/core_pattern"); after != before {
		t.Errorf("core_pattern is %q now", after)
	}
}

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":                 "net/ipv4/ip_forward",
		"net/ipv4/ip_forward":                 "net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/100.forwarding":   "net/ipv4/conf/eth0.100/forwarding",
		"net/ipv4/conf/eth0.100/forwarding":   "net/ipv4/conf/eth0.100/forwarding",
		"kernel.shm_rmid_forced":              "kernel/shm_rmid_forced",
		"hostname":                            "",
		"":                                    "",
		".net":                                "",
		"net.":                                "",
		"net..x":                              "",
		"net/./x":                             "",
		"net/../x":                            "",
		"net.x\n":                             "",
		"net.a b":                             "",
		"/net/ipv4/ip_forward":                "",
		"net.ipv4/../../kernel/core_pattern":  "", // ".." between slashes of a dotted name
		"net.ipv4.conf.//.//.kernel.hostname": "",
	} {
		got, ok := sysctlPath(name)
		if ok != (want != "") || ok && got != want {
			t.Errorf("%q: %q, %v, want %q", name, got, ok, want)
		}
	}
}

func FuzzSysctlPath(f *testing.F) {
	for _, s := range []string{"net.ipv4.ip_forward", "net/ipv4/conf/eth0.1/x", "a/../b", "net.//.x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		path, ok := sysctlPath(name)
		if ok && !filepath.IsLocal(path) || ok && filepath.Clean(path) != path {
			t.Errorf("%q: %q leads elsewhere", name, path)
		}
	})
}

func TestIdentityTellsNamespacesApart(t *testing.T) {
	a, b := pinned(t, NamespaceSet{}), pinned(t, NamespaceSet{})
	id := func(path string) string {
		t.Helper()
		id, err := Identity(path)
		if err != nil || id == "" {
			t.Errorf("%s: %q, %v", path, id, err)
		}
		return id
	}
	copied := t.TempDir() + "/net"
	if err := (namespace{path: copied}).pin(a.Net); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Unpin(copied) })
	if id(a.Net) == id(b.Net) || id(a.Net) != id(copied) {
		t.Errorf("%s, another %s, a copy %s", id(a.Net), id(b.Net), id(copied))
	}
	if _, err := Identity(t.TempDir() + "/none"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("%v", err)
	}
	atHome(t)
}

func TestUnpinRefusesWhatIsNoPin(t *testing.T) {
	dir := t.TempDir()
	full := dir + "/file"
	if err := os.WriteFile(full, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/self/ns/net", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, full, dir + "/link"} {
		if err := Unpin(path); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
}

// The directory of the pins may be on a shared mount with peers, and mount namespaces that were made later hold copies
// which receive no events. Both would keep the namespace alive.
func TestUnpinReachesEveryCopy(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	a, b := base+"/a", base+"/b"
	for _, dir := range []string{a, b} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("t", a, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(a, unix.MNT_DETACH) })
	if err := unix.Mount("", a, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(a, b, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(b, unix.MNT_DETACH) })

	if err := Pin(NamespaceSet{Net: a + "/net"}); err != nil {
		t.Fatal(err)
	}
	// A link whose other end is in the namespace goes when the namespace does.
	const probe = "bt-ns-probe"
	ns, err := os.Open(a + "/net")
	if err != nil {
		t.Fatal(err)
	}
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: probe}, PeerName: "eth9", PeerNamespace: netlink.NsFd(int(ns.Fd()))})
	_ = ns.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(probe); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	// A mount namespace with private copies, as a service manager makes.
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil { // Go makes all mounts private there
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	theirs := filepath.Join("/proc", itoa(cmd.Process.Pid), "mountinfo")
	if n := strings.Count(read(t, theirs), "/a/net "); n != 1 {
		t.Fatalf("the other mount namespace has %d copies of the pin", n)
	}

	if err := Unpin(a + "/net"); err != nil {
		t.Fatal(err)
	}
	if s := read(t, theirs); strings.Contains(s, "/a/net ") || strings.Contains(s, "/b/net ") {
		t.Errorf("the other mount namespace keeps a pin: %s", s)
	}
	if err := unix.Unmount(b, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(a, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if left := mounts(t); left != "" {
		t.Errorf("mounts left:\n%s", left)
	}
	for i := 0; ; i++ {
		if _, err := netlink.LinkByName(probe); err != nil {
			break
		}
		if i == 200 {
			t.Fatal("the network namespace lives on")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestInNamespaceReturnsHome(t *testing.T) {
	s := pinned(t, NamespaceSet{})
	want, err := os.Stat(s.Net)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		err := InNamespaces([]string{s.Net}, func() error {
			got, err := os.Stat("/proc/thread-self/ns/net")
			if err == nil && !os.SameFile(got, want) {
				t.Error("not in the namespace")
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	atHome(t)
	failure := errors.New("x")
	if err := InNamespaces([]string{s.Net}, func() error { return failure }); err != failure {
		t.Errorf("%v", err)
	}
	if err := InNamespaces([]string{s.Net + "x"}, func() error { return nil }); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("%v", err)
	}
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := InNamespaces([]string{file}, func() error { t.Error("was run"); return nil }); !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v", err)
	}
}

// Called on the main thread, the work must not be done there: that one cannot be thrown away.
func TestThrowawayThreadIsNotTheMainOne(t *testing.T) {
	for range 100 {
		if err := thread.Throwaway(func() error {
			if unix.Gettid() == os.Getpid() {
				t.Error("on the main thread")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}
