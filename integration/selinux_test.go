//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// seLinux says whether the kernel has SELinux on, with a policy.
func seLinux() bool {
	_, err := os.Stat("/sys/fs/selinux/enforce")
	return err == nil
}

// labelledNode is a node with SELinux.
type labelledNode struct{ usernsNode }

// labelledPod is a pod with a container in it.
type labelledPod struct {
	id  string
	cfg *runtimeapi.PodSandboxConfig
}

func (n labelledNode) pod(t *testing.T, name string, change func(*runtimeapi.LinuxSandboxSecurityContext)) *labelledPod {
	t.Helper()
	p := &labelledPod{cfg: n.Pod(name)}
	if change != nil {
		change(p.cfg.Linux.SecurityContext)
	}
	var err error
	p.id, err = n.CRI.RunPod(t.Context(), p.cfg)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), p.id)) })
	return p
}

func (n labelledNode) container(t *testing.T, p *labelledPod, name string, change func(*runtimeapi.ContainerConfig)) string {
	t.Helper()
	ctr := lab.Sleeper(name)
	if change != nil {
		change(ctr)
	}
	id, err := n.CRI.Start(t.Context(), p.id, p.cfg, ctr)
	must(t, err)
	return id
}

// label is the context of a container's program. Its init has the daemon's, which is ours, until it executes that.
func (n labelledNode) label(t *testing.T, id string) (label string) {
	t.Helper()
	current := func(process string) string {
		data, err := os.ReadFile("/proc/" + process + "/attr/current")
		must(t, err)
		return strings.Trim(string(data), "\x00\n")
	}
	must(t, lab.Eventually(t.Context(), time.Minute, "a label of the container's own", func(context.Context) error {
		if label = current(fmt.Sprint(n.initPID(t, id))); label == current("self") {
			return errors.New("it is " + label)
		}
		return nil
	}))
	return label
}

// inside is the context of a file as the container sees it.
func (n labelledNode) inside(t *testing.T, id, path string) string {
	t.Helper()
	return fileLabel(t, fmt.Sprintf("/proc/%d/root%s", n.initPID(t, id), path))
}

func fileLabel(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 1024)
	size, err := unix.Lgetxattr(path, "security.selinux", buf)
	if errors.Is(err, unix.ENODATA) {
		return ""
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return strings.TrimRight(string(buf[:size]), "\x00")
}

func levelOf(label string) string {
	if f := strings.SplitN(label, ":", 4); len(f) == 4 {
		return f[3]
	}
	return ""
}

// TestSELinux runs on a machine where SELinux is on: `integration/vm/run.sh -e` has one.
func TestSELinux(t *testing.T) {
	if !seLinux() {
		t.Skip("SELinux is not on in this machine's kernel; integration/vm/run.sh -e has it")
	}
	n := labelledNode{usernsNode{newNode(t)}}
	_, err := n.CRI.Pull(t.Context(), testimages.Busybox)
	must(t, err)
	ledger(t, n.Node)
	first, second := n.pod(t, "first", nil), n.pod(t, "second", nil)
	a, b := n.container(t, first, "a", nil), n.container(t, first, "b", nil)
	other := n.container(t, second, "other", nil)
	label := n.label(t, a)
	level := levelOf(label)
	files := "system_u:object_r:container_file_t:" + level

	t.Run("the containers of a pod have one label, each pod its own", func(t *testing.T) {
		if !strings.HasPrefix(label, "system_u:system_r:container_t:s0:c") {
			t.Errorf("label %q", label)
		}
		wantOutput(t, "another container of the pod", n.label(t, b), label)
		if got := n.label(t, other); got == label || !strings.HasPrefix(got, "system_u:system_r:container_t:s0:c") {
			t.Errorf("a container of another pod has %q beside %q", got, label)
		}
		wantOutput(t, "exec", strings.Trim(n.sh(t, a, "cat /proc/self/attr/current"), "\x00"), label)
	})
	t.Run("files", func(t *testing.T) {
		for _, path := range []string{"/", "/bin/busybox", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev", "/dev/null", "/dev/shm", "/proc/acpi"} {
			if path == "/proc/acpi" && n.sh(t, a, "test -e /proc/acpi && echo there || true") == "" {
				continue
			}
			wantOutput(t, path, n.inside(t, a, path), files)
		}
		n.sh(t, a, "echo x > /new; echo x > /dev/shm/new")
		wantOutput(t, "a new file", n.inside(t, a, "/new"), files)
		wantOutput(t, "a new file in /dev/shm", n.inside(t, b, "/dev/shm/new"), files)
	})
	t.Run("volumes that ask for it are relabelled", n.volumes)
	t.Run("privileged", n.privileged)
	t.Run("options", n.options)
	t.Run("bad options are refused by field and value", n.badOptions)
	t.Run("user namespace, read-only root, image volume", n.mapped)
	t.Run("process 1 of a shared PID namespace", n.sharedPID)
	t.Run("the node's namespaces", func(t *testing.T) {
		p := n.pod(t, "host", func(sc *runtimeapi.LinuxSandboxSecurityContext) {
			ns := sc.NamespaceOptions
			ns.Network, ns.Pid, ns.Ipc = runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_NODE
		})
		before := fileLabel(t, "/dev/shm")
		id := n.container(t, p, "c", func(c *runtimeapi.ContainerConfig) {
			ns := c.Linux.SecurityContext.NamespaceOptions
			ns.Network, ns.Pid, ns.Ipc = runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_NODE
		})
		if got := n.label(t, id); !strings.HasPrefix(got, "system_u:system_r:container_t:s0:c") {
			t.Errorf("label %q", got)
		}
		wantOutput(t, "the node's /dev/shm", fileLabel(t, "/dev/shm"), before)
	})
	t.Run("a daemon that is killed", func(t *testing.T) {
		must(t, n.KillBerth())
		must(t, n.StartBerth(t.Context()))
		wantOutput(t, "exec", strings.Trim(n.sh(t, a, "cat /proc/self/attr/current"), "\x00"), label)
		id := n.container(t, first, "late", nil)
		wantOutput(t, "a container made afterwards", n.label(t, id), label)
		wantOutput(t, "its /dev/shm", n.inside(t, id, "/dev/shm"), files)
	})
}

func (n labelledNode) volumes(t *testing.T) {
	dir := t.TempDir()
	volume, plain, neighbour := filepath.Join(dir, "volume"), filepath.Join(dir, "plain"), filepath.Join(dir, "neighbour")
	must(t, errors.Join(
		os.MkdirAll(filepath.Join(volume, "a", "b"), 0o755), os.Mkdir(plain, 0o755), os.Mkdir(neighbour, 0o755),
		os.WriteFile(filepath.Join(volume, "a", "b", "file"), nil, 0o644), os.WriteFile(filepath.Join(neighbour, "file"), nil, 0o644),
		os.Symlink(neighbour, filepath.Join(volume, "link")), os.Symlink(volume, filepath.Join(dir, "way")),
	))
	before := fileLabel(t, neighbour)
	p := n.pod(t, "volumes", nil)
	id := n.container(t, p, "c", func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{
			{HostPath: filepath.Join(dir, "way"), ContainerPath: "/volume", SelinuxRelabel: true},
			{HostPath: plain, ContainerPath: "/plain"},
			{Image: &runtimeapi.ImageSpec{Image: testimages.Busybox}, ContainerPath: "/image", Readonly: true, SelinuxRelabel: true},
		}
	})
	want := "system_u:object_r:container_file_t:" + levelOf(n.label(t, id))
	for _, name := range []string{"", "a/b", "a/b/file", "link"} {
		wantOutput(t, "volume/"+name, fileLabel(t, filepath.Join(volume, name)), want)
	}
	for _, path := range []string{plain, neighbour, filepath.Join(neighbour, "file"), filepath.Join(dir, "way")} {
		wantOutput(t, path, fileLabel(t, path), before)
	}
	wantOutput(t, "image volume", n.inside(t, id, "/image/bin"), want)

	ctr := lab.Sleeper("system")
	ctr.Mounts = []*runtimeapi.Mount{{HostPath: "/etc/hosts", ContainerPath: "/etc/hosts", SelinuxRelabel: true}}
	before = fileLabel(t, "/etc/hosts")
	_, err := n.CRI.Start(t.Context(), p.id, p.cfg, ctr)
	wantRefused(t, err, codes.InvalidArgument, "config.mounts[0].selinux_relabel", "/etc/hosts")
	wantOutput(t, "/etc/hosts", fileLabel(t, "/etc/hosts"), before)
}

// wantRefused fails the test unless an error is of that class and says all of the words.
func wantRefused(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(errors.Unwrap(err)) != code && status.Code(err) != code {
		t.Errorf("%v, want %v", err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v does not say %q", err, w)
		}
	}
}

// A privileged container is in the domain that the policy has for it; its files have its pod's label all the same.
func (n labelledNode) privileged(t *testing.T) {
	p := n.pod(t, "privileged", func(sc *runtimeapi.LinuxSandboxSecurityContext) { sc.Privileged = true })
	id := n.container(t, p, "c", func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	if got := n.label(t, id); !strings.Contains(got, ":spc_t:") {
		t.Errorf("label %q", got)
	}
	if got := n.sh(t, id, "cat /proc/self/attr/current"); !strings.Contains(got, ":spc_t:") {
		t.Errorf("exec has label %q", got)
	}
	confined := n.label(t, n.container(t, p, "confined", nil))
	if !strings.Contains(confined, ":container_t:s0:c") {
		t.Errorf("a container of the same pod that is not privileged has label %q", confined)
	}
	wantOutput(t, "root file system", n.inside(t, id, "/"), "system_u:object_r:container_file_t:"+levelOf(confined))
}

func (n labelledNode) options(t *testing.T) {
	p := n.pod(t, "options", func(sc *runtimeapi.LinuxSandboxSecurityContext) {
		sc.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0:c4,c5"}
	})
	with := func(o *runtimeapi.SELinuxOption) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.SelinuxOptions = o }
	}
	plain := n.container(t, p, "plain", nil)
	wantOutput(t, "the pod's level", n.label(t, plain), "system_u:system_r:container_t:s0:c4,c5")
	wantOutput(t, "its /etc/hosts", n.inside(t, plain, "/etc/hosts"), "system_u:object_r:container_file_t:s0:c4,c5")
	typed := n.container(t, p, "typed", with(&runtimeapi.SELinuxOption{Type: "spc_t"}))
	wantOutput(t, "the container's type", n.label(t, typed), "system_u:system_r:spc_t:s0:c4,c5")
	all := n.container(t, p, "all", with(&runtimeapi.SELinuxOption{User: "system_u", Role: "system_r", Type: "container_t", Level: "s0:c6"}))
	wantOutput(t, "all of the container's", n.label(t, all), "system_u:system_r:container_t:s0:c6")
	wantOutput(t, "its root", n.inside(t, all, "/"), "system_u:object_r:container_file_t:s0:c6")
	wantOutput(t, "files that both have", n.inside(t, all, "/etc/resolv.conf"), "system_u:object_r:container_file_t:s0")
}

func (n labelledNode) badOptions(t *testing.T) {
	const at = "config.linux.security_context.selinux_options"
	p := n.pod(t, "bad", nil)
	for _, c := range []struct {
		opts  *runtimeapi.SELinuxOption
		words []string
	}{
		{&runtimeapi.SELinuxOption{Level: "s0,c4,c5"}, []string{at + ".level", "s0,c4,c5"}},
		{&runtimeapi.SELinuxOption{Type: "container_t:s0"}, []string{at + ".type", "container_t:s0"}},
		{&runtimeapi.SELinuxOption{Type: "no_such_type_t"}, []string{at, "no_such_type_t"}},
		{&runtimeapi.SELinuxOption{Level: "s7:c1"}, []string{at, "s7:c1"}},
	} {
		cfg := n.Pod("refused")
		cfg.Linux.SecurityContext.SelinuxOptions = c.opts
		_, err := n.CRI.RunPod(t.Context(), cfg)
		wantRefused(t, err, codes.InvalidArgument, c.words...)
		ctr := lab.Sleeper("refused")
		ctr.Linux.SecurityContext.SelinuxOptions = c.opts
		_, err = n.CRI.Start(t.Context(), p.id, p.cfg, ctr)
		wantRefused(t, err, codes.InvalidArgument, c.words...)
	}
}

func (n labelledNode) sharedPID(t *testing.T) {
	shared := func(sc *runtimeapi.LinuxSandboxSecurityContext) {
		sc.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	}
	p := n.pod(t, "shared", shared)
	id := n.container(t, p, "c", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	})
	label := n.label(t, id)
	wantOutput(t, "process 1", strings.Trim(n.sh(t, id, "cat /proc/1/attr/current"), "\x00"), label)
	if root := n.sh(t, id, "cat /proc/1/mountinfo"); !strings.Contains(root, "container_file_t:"+levelOf(label)) {
		t.Errorf("its root: %s", root)
	}
}

func (n labelledNode) mapped(t *testing.T) {
	p := n.usernsNode.pod(t, ids(), nil)
	ctr := p.container("c")
	ctr.Linux.SecurityContext.ReadonlyRootfs = true
	ctr.Mounts = []*runtimeapi.Mount{{
		Image: &runtimeapi.ImageSpec{Image: testimages.Busybox}, ContainerPath: "/image", Readonly: true, UidMappings: p.mapping(), GidMappings: p.mapping(),
	}}
	id := n.start(t, p, ctr)
	label := n.label(t, id)
	if !strings.Contains(label, ":container_t:s0:c") {
		t.Errorf("label %q", label)
	}
	for _, path := range []string{"/", "/image/bin", "/etc/hosts", "/dev/shm"} {
		wantOutput(t, path, n.inside(t, id, path), "system_u:object_r:container_file_t:"+levelOf(label))
	}
	n.fails(t, id, "echo x > /new")
}

// TestCritestSELinux runs critest's cases of SELinux, where it is on.
func TestCritestSELinux(t *testing.T) {
	if !seLinux() {
		t.Skip("SELinux is not on in this machine's kernel; integration/vm/run.sh -e has it")
	}
	n := newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	ledger(t, n)
	r, err := n.Critest(ctx, "SELinux", "")
	must(t, err)
	for name, why := range r.Failures {
		t.Errorf("failed: %s\n%s", name, why)
	}
	t.Logf("critest's SELinux: %d passed, %d failed in %v", r.Passed, r.Failed, r.Took.Round(time.Second))
	if r.Passed < 17 {
		t.Errorf("only %d cases ran", r.Passed)
	}
}
