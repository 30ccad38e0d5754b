package network

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// holderProgram is the shim's own holder, with nothing of the shim around it.
func holderProgram(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-holder-") // not t.TempDir: it is executed by users without rights
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	main := filepath.Join(dir, "main.c")
	if err := os.WriteFile(main, []byte("int main(void) { return 3; }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("gcc", "-static", "-Wall", "-Werror", "-o", dir+"/holder", main, "../cmd/berth-shim/holder.c").CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	return dir + "/holder"
}

// usernsSet is a set of namespaces in a user namespace of 65536 users from 131072 on and as many groups from 262144 on.
func usernsSet(t *testing.T) NamespaceSet {
	t.Helper()
	needRoot(t)
	program := holderProgram(t)
	dir := t.TempDir()
	s := NamespaceSet{
		Net: dir + "/net", IPC: dir + "/ipc", UTS: dir + "/uts", Hostname: "inside",
		User: &UserNamespace{Path: dir + "/user", UIDs: IDs{131072, 65536}, GIDs: IDs{262144, 65536}, Holder: program},
	}
	t.Cleanup(func() {
		if err := Unpin(s.Net, s.IPC, s.UTS, s.User.Path); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestNamespacesBelongToTheUserNamespace(t *testing.T) {
	s := usernsSet(t)
	s.Sysctls = map[string]string{
		"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "12", "net.ipv4.ping_group_range": "5 60000",
	}
	before := read(t, "/proc/sys/fs/mqueue/msg_max")
	if err := Pin(s); err != nil {
		t.Fatal(err)
	}
	var user unix.Stat_t
	if err := unix.Stat(s.User.Path, &user); err != nil {
		t.Fatal(err)
	}
	for _, n := range s.namespaces() {
		f, err := os.Open(n.path)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
		if err != nil {
			t.Fatal(err)
		}
		var owner unix.Stat_t
		if err := errors.Join(unix.Fstat(fd, &owner), unix.Close(fd), f.Close()); err != nil {
			t.Fatal(err)
		}
		if owner.Ino != user.Ino {
			t.Errorf("%s belongs to user namespace %d, not %d", n.file, owner.Ino, user.Ino)
		}
	}
	for file, want := range map[string]string{
		"/proc/sys/net/ipv4/ip_forward": "1", "/proc/sys/kernel/shm_rmid_forced": "1", "/proc/sys/fs/mqueue/msg_max": "12",
		"/proc/sys/kernel/hostname": "inside",
		// As a user of the node sees the groups that are the pod's 5 to 60000.
		"/proc/sys/net/ipv4/ping_group_range": "262149 322144",
	} {
		if got := s.inside(t, file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if got := read(t, "/proc/sys/fs/mqueue/msg_max"); got != before {
		t.Errorf("the host's fs.mqueue.msg_max is %s now, not %s", got, before)
	}
	if text := s.inside(t, "/proc/thread-self/net/dev"); !strings.Contains(text, "lo:") {
		t.Errorf("no loopback interface: %s", text)
	}
	// It is nobody's process any more: the pin alone keeps it.
	if err := Unpin(s.Net, s.IPC, s.UTS, s.User.Path); err != nil {
		t.Fatal(err)
	}
	if left := mounts(t); left != "" {
		t.Errorf("left: %s", left)
	}
	atHome(t)
}

func TestUserNamespaceAlone(t *testing.T) {
	s := usernsSet(t)
	s = NamespaceSet{User: s.User}
	if err := Pin(s); err != nil {
		t.Fatal(err)
	}
	if !Pinned(s.User.Path) {
		t.Error("it is not pinned")
	}
	if err := Pin(s); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("a second one at the same place: %v", err)
	}
}

func TestFailedUserNamespaceLeavesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*NamespaceSet)
		class  error
		words  string
	}{
		"a sysctl that is not there": {func(s *NamespaceSet) {
			s.Sysctls = map[string]string{"net.ipv4.ip_forward": "1", "net.ipv4.zzz_no_such": "2"}
		}, errdefs.ErrInvalidArgument, `sysctl net/ipv4/zzz_no_such = "2"`},
		"a group beyond the mapping": {func(s *NamespaceSet) {
			s.Sysctls = map[string]string{"net.ipv4.ping_group_range": "0 65536"}
		}, errdefs.ErrInvalidArgument, "ping_group_range"},
		"the last place is taken": {func(s *NamespaceSet) {
			if err := os.WriteFile(s.UTS, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, errdefs.ErrAlreadyExists, "pin uts namespace"},
		"no such program": {func(s *NamespaceSet) { s.User.Holder = "/no/such/holder" }, unix.ENOENT, "make user namespace"},
		"not a holder":    {func(s *NamespaceSet) { s.User.Holder = "/bin/true" }, nil, "ended at once"},
		"nothing mapped":  {func(s *NamespaceSet) { s.User.UIDs.Length = 0 }, errdefs.ErrInvalidArgument, "uids from 131072, 0"},
		"beyond the last": {func(s *NamespaceSet) { s.User.GIDs = IDs{math.MaxUint32, 1} }, errdefs.ErrInvalidArgument, "gids from 4294967295, 1"},
		"relative path":   {func(s *NamespaceSet) { s.User.Path = "user" }, errdefs.ErrInvalidArgument, "not absolute"},
	} {
		t.Run(name, func(t *testing.T) {
			s := usernsSet(t)
			c.change(&s)
			err := Pin(s)
			if err == nil || c.class != nil && !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("error %v, want one of class %v that says %q", err, c.class, c.words)
			}
			if left := mounts(t); left != "" {
				t.Errorf("left: %s", left)
			}
			s.User.Path = filepath.Dir(s.Net) + "/user" // for the clean-up
			atHome(t)
		})
	}
}
