//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// usernsNode is a node whose pods have user namespaces of their own.
type usernsNode struct{ *lab.Node }

// usernsRange is a mapping of the kind that a kubelet sends: one range, from 0 on.
type usernsRange struct{ host, length uint32 }

func (r usernsRange) mapping() []*runtimeapi.IDMapping {
	return []*runtimeapi.IDMapping{{HostId: r.host, ContainerId: 0, Length: r.length}}
}

func (r usernsRange) options() *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: r.mapping(), Gids: r.mapping()}
}

// usernsPod is a pod with a user namespace.
type usernsPod struct {
	usernsRange
	id  string
	cfg *runtimeapi.PodSandboxConfig
}

// ids are ranges of their own for each pod of a test, as a kubelet gives them.
func ids() usernsRange { return usernsRange{lastIDs.Add(1<<16) + 1<<20, 1 << 16} }

var lastIDs atomic.Uint32

// pod runs a pod with a user namespace of its own, which goes with the test; change may be nil.
func (n usernsNode) pod(t *testing.T, r usernsRange, change func(*runtimeapi.PodSandboxConfig)) *usernsPod {
	t.Helper()
	p := &usernsPod{usernsRange: r, cfg: n.podConfig(r)}
	if change != nil {
		change(p.cfg)
	}
	var err error
	p.id, err = n.CRI.RunPod(t.Context(), p.cfg)
	must(t, err)
	t.Cleanup(func() {
		if err := n.CRI.RemovePod(context.Background(), p.id); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (n usernsNode) podConfig(r usernsRange) *runtimeapi.PodSandboxConfig {
	cfg := n.Pod(fmt.Sprintf("userns-%d", r.host))
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = r.options()
	return cfg
}

// container is a container of that pod; all capabilities show that what fails does not fail for the lack of one.
func (p *usernsPod) container(name string) *runtimeapi.ContainerConfig {
	ctr := lab.Sleeper(name)
	ns := ctr.Linux.SecurityContext.NamespaceOptions
	ns.UsernsOptions = p.options()
	ns.Network = p.cfg.Linux.SecurityContext.NamespaceOptions.Network
	ctr.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}
	ctr.Linux.SecurityContext.Seccomp = nil
	return ctr
}

// volume is a mount of a directory of the host with the pod's mapping, as a kubelet sends it.
func (p *usernsPod) volume(host, container string) *runtimeapi.Mount {
	return &runtimeapi.Mount{HostPath: host, ContainerPath: container, UidMappings: p.mapping(), GidMappings: p.mapping()}
}

func (n usernsNode) start(t *testing.T, p *usernsPod, ctr *runtimeapi.ContainerConfig) string {
	t.Helper()
	id, err := n.CRI.Start(t.Context(), p.id, p.cfg, ctr)
	must(t, err)
	return id
}

// sh runs a shell script in a container, and returns what it wrote; it fails the test unless that succeeds.
func (n usernsNode) sh(t *testing.T, id, script string) string {
	t.Helper()
	out, err := n.CRI.Exec(t.Context(), id, "sh", "-c", script)
	must(t, err)
	return strings.TrimSpace(out)
}

// fails runs a shell script that must not succeed, and returns what it complained of.
func (n usernsNode) fails(t *testing.T, id, script string) string {
	t.Helper()
	resp, err := n.CRI.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Timeout: 30})
	must(t, err)
	if resp.ExitCode == 0 {
		t.Errorf("%s: succeeded: %s", script, resp.Stdout)
	}
	return string(resp.Stderr)
}

// initPID is the pid of a container's init on the host.
func (n usernsNode) initPID(t *testing.T, id string) int {
	t.Helper()
	return (&security{Node: n.Node}).info(t, id).PID
}

func wantOutput(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// ownerOf is owner and group of a file as the host sees them.
func ownerOf(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

// TestUserNamespaces runs pods whose root is not the node's.
func TestUserNamespaces(t *testing.T) {
	n := usernsNode{newNode(t)}
	if n.Foreign() {
		t.Skip("it looks at the pins of berth's namespaces")
	}
	must(t, n.CRI.RemovePod(t.Context(), n.pod(t, ids(), nil).id)) // with what a node's first pod makes for good
	ledger(t, n.Node)
	for _, test := range []struct {
		name string
		run  func(usernsNode, *testing.T)
	}{
		{"maps", usernsNode.testMaps},
		{"root file system", usernsNode.testRootfs},
		{"two pods of one image", usernsNode.testTwoPods},
		{"volumes", usernsNode.testVolumes},
		{"the pod's own files", usernsNode.testPodFiles},
		{"a volume that cannot be mapped", usernsNode.testUnmappable},
		{"image volume", usernsNode.testImageVolume},
		{"namespaces belong to it", usernsNode.testOwners},
		{"sysctls", usernsNode.testSysctls},
		{"ping", usernsNode.testPing},
		{"port-forward", usernsNode.testDial},
		{"users beyond the mapping", usernsNode.testUnmappedUsers},
		{"no way out", usernsNode.testNoWayOut},
		{"capabilities and seccomp", usernsNode.testRestricted},
		{"procMount Unmasked", usernsNode.testProcMount},
		{"privileged", usernsNode.testPrivileged},
		{"host network", usernsNode.testHostNetwork},
		{"shared PID namespace", usernsNode.testSharedPID},
		{"PID namespace of a target", usernsNode.testTargetPID},
		{"terminal", usernsNode.testTerminal},
		{"overlap", usernsNode.testOverlap},
		{"restart of the daemon", usernsNode.testRestart},
		{"refused", usernsNode.testRefused},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(n, t) })
	}
}

func (n usernsNode) testMaps(t *testing.T) {
	status, err := n.CRI.RuntimeServiceClient.Status(t.Context(), &runtimeapi.StatusRequest{})
	must(t, err)
	if len(status.RuntimeHandlers) == 0 || !status.RuntimeHandlers[0].Features.UserNamespaces || !status.Features.UserNamespacesHostNetwork {
		t.Errorf("not among the features: %v, %v", status.RuntimeHandlers, status.Features)
	}
	// Ranges for users and groups that differ, as nothing forbids.
	users, groups := ids(), ids()
	options := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: users.mapping(), Gids: groups.mapping()}
	p := n.pod(t, users, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = options
	})
	ctr := p.container("maps")
	ctr.Linux.SecurityContext.NamespaceOptions.UsernsOptions = options
	ctr.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1234}
	ctr.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 2345}
	ctr.Linux.SecurityContext.SupplementalGroups = []int64{3456}
	id := n.start(t, p, ctr)
	wantOutput(t, "uid_map", strings.Join(strings.Fields(n.sh(t, id, "cat /proc/self/uid_map")), " "), fmt.Sprintf("0 %d %d", users.host, users.length))
	wantOutput(t, "gid_map", strings.Join(strings.Fields(n.sh(t, id, "cat /proc/1/gid_map")), " "), fmt.Sprintf("0 %d %d", groups.host, groups.length))
	wantOutput(t, "id", n.sh(t, id, "id -u; id -g; id -G"), "1234\n2345\n2345 3456")
	st, err := n.CRI.ContainerState(t.Context(), id)
	must(t, err)
	if u := st.GetUser().GetLinux(); u.GetUid() != 1234 || u.GetGid() != 2345 || fmt.Sprint(u.GetSupplementalGroups()) != "[2345 3456]" {
		t.Errorf("user in the status: %v", u)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.initPID(t, id)))
	must(t, err)
	for field, want := range map[string]uint32{"Uid:": users.host + 1234, "Gid:": groups.host + 2345} {
		if !strings.Contains(string(text), fmt.Sprintf("%s\t%d\t%d\t%d\t%d", field, want, want, want, want)) {
			t.Errorf("on the host, %s is not %d: %s", field, want, text)
		}
	}
	pod, err := n.CRI.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	must(t, err)
	if got := pod.Status.Linux.Namespaces.Options.UsernsOptions; got.String() != options.String() {
		t.Errorf("options in the status: %v", got)
	}
}

func (n usernsNode) testRootfs(t *testing.T) {
	p := n.pod(t, ids(), nil)
	id := n.start(t, p, p.container("rootfs"))
	wantOutput(t, "owners inside", n.sh(t, id, "stat -c %u:%g / /bin /bin/busybox /tmp /etc/passwd"), strings.TrimSuffix(strings.Repeat("0:0\n", 5), "\n"))
	n.sh(t, id, "echo x > /new; mkdir /dir; echo y > /dir/file; chown 1000:2000 /dir/file; chmod u+s /bin/busybox; echo z >> /etc/passwd; mv /tmp /moved; ln -s x /link; mkfifo /fifo")
	wantOutput(t, "what was written", n.sh(t, id, "stat -c %u:%g:%F /new /dir/file /etc/passwd /moved /link /fifo"),
		"0:0:regular file\n1000:2000:regular file\n0:0:regular file\n0:0:directory\n0:0:symbolic link\n0:0:fifo")
	upper := filepath.Join(n.Root(), "images", "rootfs", id, "upper")
	for name, want := range map[string]uint32{".": 0, "new": 0, "dir": 0, "dir/file": 1000, "etc/passwd": 0, "bin/busybox": 0} {
		if got := ownerOf(t, filepath.Join(upper, name)); !strings.HasPrefix(got, fmt.Sprintf("%d:", p.host+want)) {
			t.Errorf("on the host %s belongs to %s, want %d", name, got, p.host+want)
		}
	}
}

func (n usernsNode) testTwoPods(t *testing.T) {
	a, b := n.pod(t, ids(), nil), n.pod(t, ids(), nil)
	plain := n.Pod("plain-beside")
	plainID, err := n.CRI.RunPod(t.Context(), plain)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), plainID)) })
	idA, idB := n.start(t, a, a.container("a")), n.start(t, b, b.container("b"))
	idPlain, err := n.CRI.Start(t.Context(), plainID, plain, lab.Sleeper("plain"))
	must(t, err)
	for id, want := range map[string]uint32{idA: a.host, idB: b.host, idPlain: 0} {
		wantOutput(t, "owner inside", n.sh(t, id, "stat -c %u /bin/busybox"), "0")
		wantOutput(t, "owner outside", ownerOf(t, filepath.Join(n.Run(), "containers", id, "rootfs/bin/busybox")), fmt.Sprintf("%d:%d", want, want))
	}
	n.sh(t, idA, "echo a > /bin/mine")
	n.fails(t, idB, "cat /bin/mine")
	n.fails(t, idPlain, "cat /bin/mine")
}

func (n usernsNode) testVolumes(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"data", "plain", "ro"} {
		must(t, os.Mkdir(filepath.Join(dir, sub), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(dir, "data/theirs"), nil, 0o600))
	must(t, os.Chown(filepath.Join(dir, "data/theirs"), 1000, 3000))
	must(t, os.WriteFile(filepath.Join(dir, "termination-log"), nil, 0o666))
	p := n.pod(t, ids(), nil)
	ctr := p.container("volumes")
	ro := p.volume(filepath.Join(dir, "ro"), "/ro")
	ro.Readonly, ro.RecursiveReadOnly = true, true
	odd := p.volume(dir, "/odd") // not the pod's mapping: only 1000, which is the pod's user 7
	odd.UidMappings = []*runtimeapi.IDMapping{{ContainerId: 1000, HostId: p.host + 7, Length: 1}}
	ctr.Mounts = []*runtimeapi.Mount{
		p.volume(filepath.Join(dir, "data"), "/data"), ro, odd,
		{HostPath: filepath.Join(dir, "plain"), ContainerPath: "/plain"},
		p.volume(filepath.Join(dir, "termination-log"), "/dev/termination-log"),
	}
	id := n.start(t, p, ctr)
	n.sh(t, id, "echo x > /data/ours; echo x > /data/users; chown 1000:1000 /data/users; echo done > /dev/termination-log")
	wantOutput(t, "inside", n.sh(t, id, "stat -c %u:%g /data /data/theirs /data/ours /data/users"), "0:0\n1000:3000\n0:0\n1000:1000")
	wantOutput(t, "ours, outside", ownerOf(t, filepath.Join(dir, "data/ours")), "0:0")
	wantOutput(t, "a user's, outside", ownerOf(t, filepath.Join(dir, "data/users")), "1000:1000")
	wantOutput(t, "another mapping", n.sh(t, id, "stat -c %u /odd/data/theirs; stat -c %u /odd/data"), "7\n65534")
	n.fails(t, id, "echo x > /ro/file")
	// Without a mapping the files are nobody's, and nothing of them is the container's to change.
	wantOutput(t, "not mapped", n.sh(t, id, "stat -c %u:%g /plain"), "65534:65534")
	n.fails(t, id, "echo x > /plain/file")
	text, err := os.ReadFile(filepath.Join(dir, "termination-log"))
	must(t, err)
	wantOutput(t, "termination log", string(text), "done\n")
}

func (n usernsNode) testPodFiles(t *testing.T) {
	p := n.pod(t, ids(), nil)
	a, b := n.start(t, p, p.container("a")), n.start(t, p, p.container("b"))
	wantOutput(t, "owners", n.sh(t, a, "stat -c %u:%g:%a /etc/hosts /etc/hostname /etc/resolv.conf /dev/shm /dev/mqueue"), "0:0:644\n0:0:644\n0:0:644\n0:0:1777\n0:0:1777")
	n.sh(t, a, "echo 1.2.3.4 name >> /etc/hosts; echo x > /dev/shm/x; chown 5:5 /dev/shm/x; test -c /dev/null; echo y > /dev/null; ls /dev/mqueue")
	wantOutput(t, "shared by the pod", n.sh(t, b, "tail -n 1 /etc/hosts; stat -c %u /dev/shm/x"), "1.2.3.4 name\n5")
}

// A kernel's bare EINVAL has let users search for hours (kubernetes#114011).
func (n usernsNode) testUnmappable(t *testing.T) {
	p := n.pod(t, ids(), nil)
	ctr := p.container("unmappable")
	ctr.Mounts = []*runtimeapi.Mount{p.volume(t.TempDir(), "/good"), p.volume("/sys/kernel", "/bad")}
	_, err := n.CRI.Create(t.Context(), p.id, p.cfg, ctr)
	wantCode(t, err, codes.FailedPrecondition, "config.mounts[1].uidMappings", "/sys/kernel", "/bad", "sysfs cannot map ids")
}

func (n usernsNode) testImageVolume(t *testing.T) {
	_, err := n.CRI.Pull(t.Context(), testimages.Nginx)
	must(t, err)
	p := n.pod(t, ids(), nil)
	ctr := p.container("image-volume")
	whole := p.volume("", "/image")
	whole.Image, whole.Readonly = &runtimeapi.ImageSpec{Image: testimages.Nginx}, true
	sub := p.volume("", "/sub")
	sub.Image, sub.Readonly, sub.ImageSubPath = whole.Image, true, "usr/sbin"
	ctr.Mounts = []*runtimeapi.Mount{whole, sub}
	id := n.start(t, p, ctr)
	wantOutput(t, "owners", n.sh(t, id, "stat -c %u:%g /image /image/usr/sbin/nginx /sub/nginx"), "0:0\n0:0\n0:0")
	n.fails(t, id, "echo x > /image/x")
	n.fails(t, id, "rm /sub/nginx")
}

// Whoever is root of the user namespace has a say in namespaces that belong to it, and in no others.
func (n usernsNode) testOwners(t *testing.T) {
	p := n.pod(t, ids(), nil)
	id := n.start(t, p, p.container("owners"))
	pins := filepath.Join(n.Run(), "pods", p.id, "ns")
	var user unix.Stat_t
	must(t, unix.Stat(filepath.Join(pins, "user"), &user))
	owner := func(path string) uint64 {
		f, err := os.Open(path)
		must(t, err)
		defer f.Close()
		fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
		must(t, err)
		defer unix.Close(fd)
		var st unix.Stat_t
		must(t, unix.Fstat(fd, &st))
		return st.Ino
	}
	for _, kind := range []string{"net", "ipc", "uts"} {
		if got := owner(filepath.Join(pins, kind)); got != user.Ino {
			t.Errorf("%s belongs to user namespace %d, not to %d", kind, got, user.Ino)
		}
	}
	init := fmt.Sprintf("/proc/%d/ns/", n.initPID(t, id))
	for _, kind := range []string{"mnt", "pid", "net", "ipc", "uts"} {
		if got := owner(init + kind); got != user.Ino {
			t.Errorf("the container's %s belongs to user namespace %d, not to %d", kind, got, user.Ino)
		}
	}
	n.sh(t, id, "ip link add br7 type bridge && ip link set br7 up && hostname other && test $(hostname) = other")
	// The shim is none of it: it is the node's.
	resp, err := n.CRI.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	must(t, err)
	if !strings.Contains(fmt.Sprint(resp.Info), "pid") {
		t.Errorf("no pid in %v", resp.Info)
	}
}

func (n usernsNode) testSysctls(t *testing.T) {
	r := ids()
	p := n.pod(t, r, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "kernel.shmmax": "123456789", "fs.mqueue.msg_max": "11",
			"net.ipv4.ping_group_range": "7 4000",
		}
	})
	id := n.start(t, p, p.container("sysctls"))
	wantOutput(t, "sysctls", n.sh(t, id, "cd /proc/sys; cat net/ipv4/ip_forward kernel/shm_rmid_forced kernel/shmmax fs/mqueue/msg_max net/ipv4/ip_unprivileged_port_start; cat net/ipv4/ping_group_range | tr '\t' ' '"),
		"1\n1\n123456789\n11\n0\n7 4000") // groups as the pod knows them
	for set, want := range map[[2]string]string{
		{"net.ipv4.ping_group_range", "0 70000"}: "net/ipv4/ping_group_range", // beyond the mapping
		{"net.ipv4.no_such", "1"}:                "net/ipv4/no_such",
		{"kernel.shmmni", "-5000000000"}:         "kernel/shmmni",
	} {
		cfg := n.podConfig(ids())
		cfg.Linux.Sysctls = map[string]string{set[0]: set[1]}
		_, err := n.CRI.RunPod(t.Context(), cfg)
		wantCode(t, err, codes.InvalidArgument, want, set[1])
	}
}

func (n usernsNode) testPing(t *testing.T) {
	a, b := n.pod(t, ids(), nil), n.pod(t, ids(), nil)
	id := n.start(t, a, a.container("ping"))
	ip, err := n.CRI.PodIP(t.Context(), b.id)
	must(t, err)
	n.sh(t, id, "ping -c 3 -W 10 "+ip)
	n.sh(t, id, "ping -c 1 -W 10 127.0.0.1")
}

// The runtime connects inside the pod's network, which belongs to the pod's user namespace.
func (n usernsNode) testDial(t *testing.T) {
	p := n.pod(t, ids(), nil)
	ctr := p.container("listener")
	ctr.Command = []string{"sh", "-c", "while :; do echo hello | nc -l -p 80; done"}
	n.start(t, p, ctr)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	port := free.Addr().(*net.TCPAddr).Port
	must(t, free.Close())
	cmd := n.CrictlCommand(ctx, "port-forward", p.id, fmt.Sprintf("%d:80", port))
	must(t, cmd.Start())
	defer func() { cancel(); _ = cmd.Wait() }()
	must(t, lab.Eventually(ctx, 45*time.Second, "an answer through the forwarded port", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 5)
		if _, err := conn.Read(b); err != nil || string(b) != "hello" {
			return fmt.Errorf("%q: %v", b, err)
		}
		return nil
	}))
}

func (n usernsNode) testUnmappedUsers(t *testing.T) {
	small := usernsRange{ids().host, 2000}
	p := n.pod(t, small, nil)
	id := n.start(t, p, p.container("fits"))
	wantOutput(t, "chown inside the mapping", n.sh(t, id, "touch /x; chown 1999:1999 /x; stat -c %u /x"), "1999")
	if why := n.fails(t, id, "chown 2000 /x"); !strings.Contains(why, "Invalid argument") {
		t.Error(why)
	}
	for field, change := range map[string]func(*runtimeapi.LinuxContainerSecurityContext){
		"run_as_user.value":      func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser = &runtimeapi.Int64Value{Value: 2000} },
		"supplemental_groups[1]": func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroups = []int64{1, 70000} },
		"run_as_group.value": func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsUser, sc.RunAsGroup = &runtimeapi.Int64Value{Value: 1}, &runtimeapi.Int64Value{Value: 2000}
		},
	} {
		ctr := p.container("beyond")
		change(ctr.Linux.SecurityContext)
		_, err := n.CRI.Create(t.Context(), p.id, p.cfg, ctr)
		wantCode(t, err, codes.InvalidArgument, "config.linux.security_context."+field, "0..1999")
	}
}

// Root of the pod, with all capabilities and no seccomp filter, is nobody outside.
func (n usernsNode) testNoWayOut(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("secret\n"), 0o600))
	p := n.pod(t, ids(), nil)
	ctr := p.container("attack")
	ctr.Mounts = []*runtimeapi.Mount{{HostPath: secret, ContainerPath: "/secret"}}
	id := n.start(t, p, ctr)
	for _, attack := range []string{
		"cat /secret",
		"chown 0 /secret",
		"mknod /null c 1 3 && echo x > /null",
		"mknod /disk b 8 0",
		"mount -t ext4 /dev/vda /mnt",
		"echo 1 > /proc/sys/kernel/panic",
		"echo c > /proc/sysrq-trigger",
		"echo -1000 > /proc/1/oom_score_adj",
		"adjtimex -t 9999",
		"dmesg -n 1",
		"echo 0 0 1 > /proc/self/uid_map",
		"f=/sys/fs/cgroup/cgroup.procs; test -e $f || f=/sys/fs/cgroup/memory/cgroup.procs; echo $$ > $f",
		"echo x > /sys/kernel/mm/ksm/run",
	} {
		n.fails(t, id, attack)
	}
	wantOutput(t, "the secret belongs to", ownerOf(t, secret), "0:0")
}

func (n usernsNode) testRestricted(t *testing.T) {
	p := n.pod(t, ids(), nil)
	ctr := p.container("restricted")
	ctr.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	ctr.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	ctr.Linux.SecurityContext.NoNewPrivs = true
	ctr.Linux.SecurityContext.ReadonlyRootfs = true
	id := n.start(t, p, ctr)
	wantOutput(t, "status", n.sh(t, id, "grep -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/1/status | tr '\t' ' '"),
		"CapEff: 0000000000000000\nCapBnd: 0000000000000000\nNoNewPrivs: 1\nSeccomp: 2")
	n.fails(t, id, "echo x > /x")
	n.fails(t, id, "chown 5 /dev/shm")
	n.fails(t, id, "unshare -U true")
	n.fails(t, id, "hostname other")
}

// KEP-4265: a pod of its own user namespace may have an unmasked /proc, in which to run containers itself.
func (n usernsNode) testProcMount(t *testing.T) {
	p := n.pod(t, ids(), nil)
	masked, unmasked := p.container("masked"), p.container("unmasked")
	unmasked.Linux.SecurityContext.MaskedPaths, unmasked.Linux.SecurityContext.ReadonlyPaths = nil, nil
	for _, c := range []*runtimeapi.ContainerConfig{masked, unmasked} { // the default profile lets nobody mount
		c.Linux.SecurityContext.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	}
	const inner = "unshare -U -r -m -p -f -- sh -c 'mkdir -p /inner && mount -t proc proc /inner && cat /inner/self/stat'"
	id := n.start(t, p, masked)
	n.fails(t, id, inner)
	n.fails(t, id, "echo 1 > /proc/sys/net/ipv4/ip_forward")
	id = n.start(t, p, unmasked)
	n.sh(t, id, inner)
	n.sh(t, id, "echo 1 > /proc/sys/net/ipv4/ip_forward")
	n.fails(t, id, "echo 1 > /proc/sys/vm/drop_caches")
}

func (n usernsNode) testPrivileged(t *testing.T) {
	p := n.pod(t, ids(), func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
	ctr := p.container("privileged")
	ctr.Linux.SecurityContext.Privileged = true
	id := n.start(t, p, ctr)
	n.sh(t, id, "mkdir -p /mnt/t && mount -t tmpfs none /mnt/t && ip link add br7 type bridge")
	wantOutput(t, "root is", n.sh(t, id, "cat /proc/self/uid_map | tr -s ' ' | cut -d ' ' -f 3"), fmt.Sprint(p.host))
	n.sh(t, id, "test -c /dev/null && test -c /dev/full && test -e /dev/kmsg")
	n.fails(t, id, "echo 1 > /proc/sys/kernel/panic")
}

func (n usernsNode) testHostNetwork(t *testing.T) {
	p := n.pod(t, ids(), func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.SecurityContext.NamespaceOptions.Network, cfg.Hostname = runtimeapi.NamespaceMode_NODE, ""
	})
	id := n.start(t, p, p.container("host-network"))
	own, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	wantOutput(t, "network namespace", n.sh(t, id, "readlink /proc/self/ns/net"), own)
	wantOutput(t, "links in /sys", n.sh(t, id, "test -d /sys/class/net/lo && echo yes"), "yes")
	for _, attack := range []string{
		"ip link add br7 type bridge", "ip addr add 192.0.2.1/32 dev lo", "echo 1 > /sys/class/net/lo/mtu", "mount -o remount,rw /sys",
		"echo 1 > /proc/sys/net/ipv4/ip_forward", "hostname other", "umount /sys",
	} {
		n.fails(t, id, attack)
	}
}

func (n usernsNode) testSharedPID(t *testing.T) {
	for _, r := range []usernsRange{ids(), {ids().host, 100}} { // in the second one there is no 65534
		p := n.pod(t, r, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		})
		ctr := func(name string) *runtimeapi.ContainerConfig {
			c := p.container(name)
			c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			return c
		}
		a, b := n.start(t, p, ctr("a")), n.start(t, p, ctr("b"))
		wantOutput(t, "process 1", n.sh(t, a, "cat /proc/1/comm"), "pause")
		wantOutput(t, "process 1 is", n.sh(t, b, "stat -c %u /proc/1; grep -E '^Cap(Prm|Bnd)' /proc/1/status | cut -f 2"),
			fmt.Sprintf("%d\n0000000000000000\n0000000000000000", min(r.length-1, 65534)))
		if got := n.sh(t, a, "grep -l '^sleep' /proc/[0-9]*/comm | wc -l"); got != "2" {
			t.Errorf("%s processes of both containers", got)
		}
		_, _ = n.CRI.Exec(t.Context(), a, "sh", "-c", "kill -9 -1") // which is killed itself, once its container has ended
		if st, err := n.CRI.WaitExit(t.Context(), b, 30*time.Second); err != nil || st.ExitCode != 137 {
			t.Errorf("the other container's processes are its own to kill, like those of one pod: %v, %v", st, err)
		}
	}
}

func (n usernsNode) testTargetPID(t *testing.T) {
	p := n.pod(t, ids(), nil)
	target := n.start(t, p, p.container("target"))
	ctr := p.container("debugger")
	ns := ctr.Linux.SecurityContext.NamespaceOptions
	ns.Pid, ns.TargetId = runtimeapi.NamespaceMode_TARGET, target
	id := n.start(t, p, ctr)
	wantOutput(t, "namespace", n.sh(t, id, "readlink /proc/self/ns/pid"), n.sh(t, target, "readlink /proc/self/ns/pid"))
	n.sh(t, id, "ls /proc/1/root/bin/busybox; kill -0 1")
}

func (n usernsNode) testTerminal(t *testing.T) {
	for _, r := range []usernsRange{ids(), {ids().host, 3}} { // in the second one there is no group 5, whose terminals are
		p := n.pod(t, r, nil)
		ctr := p.container("terminal")
		ctr.Tty = true
		ctr.Command = []string{"sh", "-c", "stat -c '%u %F' /dev/console; tty; sleep 86400"}
		id := n.start(t, p, ctr)
		must(t, lab.Eventually(t.Context(), 30*time.Second, "the terminal's lines in the log", func(context.Context) error {
			lines, err := lab.Log(p.cfg, ctr)
			if err == nil && (len(lines) < 2 || !strings.HasPrefix(lines[0].Text, "0 character special") || !strings.HasPrefix(lines[1].Text, "/dev/pts/0")) {
				err = fmt.Errorf("%v", lines)
			}
			return err
		}))
		wantOutput(t, "exec", n.sh(t, id, "id -u"), "0")
	}
}

func (n usernsNode) testOverlap(t *testing.T) {
	r := ids()
	first := n.pod(t, r, nil)
	name := n.Network() + "/" + first.cfg.Metadata.Name
	for what, other := range map[string]usernsRange{
		"the same": r, "its last": {r.host + r.length - 1, 1}, "around it": {r.host - 10, r.length + 20}, "its beginning": {r.host - 10, 11},
	} {
		_, err := n.CRI.RunPod(t.Context(), n.podConfig(other))
		if err == nil {
			t.Errorf("%s: not refused", what)
		}
		wantCode(t, err, codes.InvalidArgument, "userns_options.uids[0].host_id", fmt.Sprint(other.host), "overlaps", name)
	}
	cfg := n.podConfig(ids())
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions.Gids = r.mapping()
	_, err := n.CRI.RunPod(t.Context(), cfg)
	wantCode(t, err, codes.InvalidArgument, "userns_options.gids[0].host_id", name)

	n.pod(t, usernsRange{r.host + r.length, 1}, nil)
	n.pod(t, usernsRange{r.host - 1, 1}, nil)
	// A pod that is stopped has no ids any more: its next sandbox gets them again.
	_, err = n.CRI.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: first.id})
	must(t, err)
	n.pod(t, r, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-next" })
}

func (n usernsNode) testRestart(t *testing.T) {
	r := ids()
	p := n.pod(t, r, nil)
	id := n.start(t, p, p.container("before"))
	must(t, n.KillBerth())
	must(t, n.StartBerth(t.Context()))
	wantOutput(t, "exec", n.sh(t, id, "id -u; stat -c %u /bin/busybox"), "0\n0")
	_, err := n.CRI.RunPod(t.Context(), n.podConfig(r))
	wantCode(t, err, codes.InvalidArgument, "overlaps", p.cfg.Metadata.Name)
	after := n.start(t, p, p.container("after"))
	wantOutput(t, "one user namespace", n.sh(t, after, "readlink /proc/self/ns/user"), n.sh(t, id, "readlink /proc/self/ns/user"))
	_, err = n.CRI.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 30})
	must(t, err)
	if st, err := n.CRI.ContainerState(t.Context(), id); err != nil || st.ExitCode != 0 || st.Reason != "Completed" {
		t.Errorf("%v, %v", st, err)
	}
}

func (n usernsNode) testRefused(t *testing.T) {
	const pod, node = runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_NODE
	good := ids().mapping()
	one := func(host, container, length uint32) []*runtimeapi.IDMapping {
		return []*runtimeapi.IDMapping{{HostId: host, ContainerId: container, Length: length}}
	}
	before, err := n.CRI.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	for _, c := range []struct {
		u     *runtimeapi.UserNamespace
		field string
	}{
		{&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER}, "mode: CONTAINER"},
		{&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_TARGET}, "mode: TARGET"},
		{&runtimeapi.UserNamespace{Mode: 9}, "mode: 9"},
		{&runtimeapi.UserNamespace{Mode: node, Uids: good}, "uids: 1 mappings are given with mode NODE"},
		{&runtimeapi.UserNamespace{Mode: node, Gids: good}, "gids: 1 mappings are given with mode NODE"},
		{&runtimeapi.UserNamespace{Mode: pod}, "uids: 0 mappings"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: good}, "gids: 0 mappings"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: append(one(5, 0, 1), good...), Gids: good}, "uids: 2 mappings"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: one(70000, 1, 10), Gids: good}, "uids[0].container_id: 1"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: good, Gids: one(0, 0, 10)}, "gids[0].host_id: 0"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: one(70000, 0, 0), Gids: good}, "uids[0].length: 0"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: one(4294967295, 0, 1), Gids: good}, "uids[0].length: 1"},
		{&runtimeapi.UserNamespace{Mode: pod, Uids: one(70000, 0, 4294967295), Gids: good}, "uids[0].length: 4294967295"},
	} {
		cfg := n.podConfig(ids())
		cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = c.u
		_, err := n.CRI.RunPod(t.Context(), cfg)
		wantCode(t, err, codes.InvalidArgument, "config.linux.security_context.namespace_options.userns_options."+c.field)
	}
	for field, change := range map[string]func(*runtimeapi.NamespaceOption){
		"pid: NODE": func(o *runtimeapi.NamespaceOption) { o.Pid = node },
		"ipc: NODE": func(o *runtimeapi.NamespaceOption) { o.Ipc = node },
	} {
		cfg := n.podConfig(ids())
		change(cfg.Linux.SecurityContext.NamespaceOptions)
		_, err := n.CRI.RunPod(t.Context(), cfg)
		wantCode(t, err, codes.InvalidArgument, "config.linux.security_context.namespace_options."+field)
	}
	after, err := n.CRI.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	if len(after.Items) != len(before.Items) {
		t.Error(errors.New("a refused pod is listed"))
	}

	p := n.pod(t, ids(), nil)
	for field, change := range map[string]func(*runtimeapi.ContainerConfig){
		"userns_options": func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = ids().options()
		},
		`userns_options: "none" differs from the pod's, POD 0:`: func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = nil },
		"config.mounts[0].gidMappings": func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: "/", ContainerPath: "/x", UidMappings: good}}
		},
		"config.mounts[0].uidMappings[1].container_id": func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: "/", ContainerPath: "/x", UidMappings: append(one(5, 3, 1), one(7, 0, 9)...), GidMappings: good}}
		},
	} {
		ctr := p.container("refused")
		change(ctr)
		_, err := n.CRI.Create(t.Context(), p.id, p.cfg, ctr)
		wantCode(t, err, codes.InvalidArgument, field)
	}
	ordinary := n.Pod("ordinary")
	id, err := n.CRI.RunPod(t.Context(), ordinary)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), id)) })
	ctr := lab.Sleeper("refused")
	ctr.Mounts = []*runtimeapi.Mount{p.volume("/", "/x")}
	_, err = n.CRI.Create(t.Context(), id, ordinary, ctr)
	wantCode(t, err, codes.InvalidArgument, "config.mounts[0].uidMappings", "without a user namespace")
}
