package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/internal/step"
	"github.com/berth-run/berth/network"
)

// dir is a path below the pod's directory in the run root.
func (p *pod) dir(parts ...string) string {
	return p.m.runDir(append([]string{"pods", p.rec.ID}, parts...)...)
}

// nsPath is where a namespace of the pod is pinned.
func (p *pod) nsPath(kind string) string { return p.dir("ns", kind) }

// steps returns the named steps of a pod, in the order of the names. What they do and undo follows from the record
// alone, so that recovery has them, too.
func (p *pod) steps(names ...string) []step.Step {
	all := map[string]step.Step{
		"dirs":          {Timeout: 10 * time.Second, Do: p.makeDirs, Undo: p.removeDirs},
		"namespaces":    {Timeout: 10 * time.Second, Do: p.pinNamespaces, Undo: p.unpinNamespaces},
		"files":         {Timeout: 10 * time.Second, Do: p.makeFiles, Undo: p.removeFiles},
		"cgroup":        {Timeout: 20 * time.Second, Do: p.makeCgroup, Undo: p.removeCgroup},
		"shim":          {Timeout: 30 * time.Second, Do: p.startShim, Undo: p.stopShim},
		"network":       {Timeout: 100 * time.Second, Do: p.connect, Undo: p.disconnect},
		"pid-namespace": {Timeout: 10 * time.Second, Do: p.pinPID, Undo: p.unpinPID},
	}
	list := make([]step.Step, 0, len(names))
	for _, n := range names {
		s, ok := all[n]
		if !ok { // of a later or former release: say so, and go on with the others
			s = step.Step{Undo: func(context.Context) error { return nil }}
			p.m.log.Warn("record names a step that this berth does not know", "id", p.rec.ID, "step", n)
		}
		s.Name = n
		list = append(list, s)
	}
	return list
}

func (p *pod) makeDirs(context.Context) error {
	return os.MkdirAll(p.dir("ns"), 0o700)
}

func (p *pod) removeDirs(context.Context) error {
	if p.holds("namespaces") {
		return errors.New("kept for the namespaces that are pinned there")
	}
	return os.RemoveAll(p.dir())
}

// holds tells whether a step is begun and not undone.
func (p *pod) holds(name string) bool { return slices.Contains(p.record().Steps, name) }

func (p *pod) pinNamespaces(context.Context) error {
	cfg := p.config()
	sysctls, err := spec.SandboxSysctls(cfg)
	if err != nil {
		return err
	}
	set := network.NamespaceSet{Sysctls: sysctls}
	if !spec.HostNetwork(cfg) {
		set.Net, set.UTS = p.nsPath("net"), p.nsPath("uts")
		set.Hostname = spec.Hostname(cfg, p.m.host)
	}
	if !spec.HostIPC(cfg) {
		set.IPC = p.nsPath("ipc")
	}
	if userns, own := spec.Userns(cfg); own {
		if err := p.m.userns.claim(p.rec.ID, cfg); err != nil {
			return err
		}
		set.User = p.m.networkUserns(p.nsPath("user"), userns)
	}
	if err := network.Pin(set); err != nil || set.Net == "" {
		return err
	}
	id, err := network.Identity(set.Net)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.rec.NetID = id // kept with the next step
	p.mu.Unlock()
	return nil
}

// isPinned says whether the pod's network namespace, and no other, is pinned where it should be.
func (p *pod) isPinned(rec podRecord) bool {
	if !network.Pinned(p.nsPath("net")) {
		return false
	}
	id, err := network.Identity(p.nsPath("net"))
	return err == nil && (rec.NetID == "" || rec.NetID == id)
}

// unpinNamespaces keeps the network namespace for as long as its network could not be released: plugins find there what
// they have to remove outside of it (the bridge plugin, the addresses of its masquerade rules).
func (p *pod) unpinNamespaces(context.Context) error {
	err := network.Unpin(p.nsPath("ipc"), p.nsPath("uts"))
	if p.holds("network") && network.Pinned(p.nsPath("net")) {
		return errors.Join(err, errors.New("the network namespace is kept until its network is released"))
	}
	// The user namespace goes last: while one of the others is there, nobody else may have its ids.
	if err := errors.Join(err, network.Unpin(p.nsPath("net"))); err != nil {
		return err
	}
	if err := network.Unpin(p.nsPath("user")); err != nil {
		return err
	}
	p.m.userns.free(p.rec.ID)
	return nil
}

// files are what every container of the pod gets bound: /etc/hosts, /etc/hostname, /etc/resolv.conf, /dev/shm.
func (p *pod) files() spec.PodFiles {
	f := spec.PodFiles{Hosts: p.dir("hosts"), Hostname: p.dir("hostname"), ResolvConf: p.dir("resolv.conf"), Shm: p.dir("shm")}
	if spec.HostIPC(p.config()) {
		f.Shm = "/dev/shm"
	}
	return f
}

// shmSize is the size of a pod's /dev/shm: Docker's, and so what images expect.
const shmSize = "67108864"

func (p *pod) makeFiles(context.Context) error {
	cfg := p.config()
	host, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	hosts := []byte("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if spec.HostNetwork(cfg) {
		if hosts, err = os.ReadFile("/etc/hosts"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for name, data := range map[string][]byte{
		"hosts":       hosts,
		"hostname":    []byte(spec.Hostname(cfg, p.m.host) + "\n"),
		"resolv.conf": spec.ResolvConf(cfg.GetDnsConfig(), host),
	} {
		if err := writeFile(p.dir(name), data, 0o644); err != nil {
			return err
		}
		if err := p.giveToRoot(p.dir(name)); err != nil {
			return err
		}
	}
	if err := p.labelFiles(p.rec.SELinux.Mount); err != nil {
		return err
	}
	if spec.HostIPC(cfg) {
		return nil
	}
	if err := os.Mkdir(p.dir("shm"), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	options := "mode=1777,size=" + shmSize
	if userns, own := spec.Userns(cfg); own {
		options += fmt.Sprintf(",uid=%d,gid=%d", userns.UIDs.Host, userns.GIDs.Host)
	}
	options = label.FormatMountLabel(options, p.rec.SELinux.Mount)
	if err := unix.Mount("shm", p.dir("shm"), "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount /dev/shm: %w", err)
	}
	return nil
}

// writeFile is os.WriteFile whatever the umask.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.WriteFile(path, data, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func (p *pod) removeFiles(context.Context) error {
	return unmount(p.dir("shm"))
}

// unmount detaches whatever is mounted at a path: once our last user is gone nothing needs to wait for it.
func unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch err {
		case nil:
			continue
		case unix.EINVAL, unix.ENOENT:
			return nil
		}
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
}

func (p *pod) makeCgroup(context.Context) error {
	return cgroups.CreateSandbox(cgroups.Path(p.rec.Cgroup))
}

func (p *pod) removeCgroup(context.Context) error {
	path := cgroups.Path(p.rec.Cgroup)
	if err := cgroups.Kill(path); err != nil {
		return err
	}
	return cgroups.Remove(path)
}

// startShim starts the shim in the pod's namespaces and cgroup and begins to watch it.
func (p *pod) startShim(ctx context.Context) error {
	cfg := p.config()
	l := launch{
		dir: p.dir(), cgroup: cgroups.Path(p.rec.Cgroup), sharedPID: spec.SharedPID(cfg),
		oomScoreAdj: p.m.clampOOMScore(sandboxOOMScore), labels: p.rec.SELinux, mounts: p.m.lean,
	}
	if cfg.GetLinux().GetSecurityContext().GetPrivileged() {
		l.labels.Process = ""
	}
	if userns, own := spec.Userns(cfg); own {
		l.userns, l.nobody = p.nsPath("user"), min(nobody, userns.UIDs.Length-1, userns.GIDs.Length-1)
	}
	if !spec.HostNetwork(cfg) {
		l.namespaces = append(l.namespaces, p.nsPath("net"), p.nsPath("uts"))
	}
	if !spec.HostIPC(cfg) {
		l.namespaces = append(l.namespaces, p.nsPath("ipc"))
	}
	pid, err := p.m.launcher.startShim(ctx, l)
	if err != nil {
		return err
	}
	if err := p.update(func(r *podRecord) { r.ShimPID, r.Lean = pid, l.mounts != nil }); err != nil {
		return err
	}
	_, err = p.startWatch()
	return err
}

// nobody is the user that owns nothing, by custom.
const nobody = 65534

// sandboxOOMScore is the kubelet's own for sandboxes: the last to be killed for memory.
const sandboxOOMScore = -998

// stopShim ends the shim and everything in the sandbox's cgroup.
func (p *pod) stopShim(ctx context.Context) error {
	p.unwatch()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_ = p.shim().Shutdown(ctx) // politely first; what does not answer is killed
	return cgroups.Kill(cgroups.Path(p.rec.Cgroup))
}

func (p *pod) pinPID(context.Context) error {
	p.mu.Lock()
	pid := p.rec.PausePID
	p.mu.Unlock()
	if pid <= 0 {
		return errors.New("shim has no PID 1 for the shared PID namespace")
	}
	return p.pinOf(pid, "pid")
}

// pinOf pins a namespace that a process is in.
func (p *pod) pinOf(pid int, kind string) error {
	f, err := os.OpenFile(p.nsPath(kind), os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_ = f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/%s", pid, kind), p.nsPath(kind), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin %s namespace: %w", kind, err)
	}
	return nil
}

func (p *pod) unpinPID(context.Context) error { return network.Unpin(p.nsPath("pid")) }

// network is the pod as the network sees it.
func (p *pod) network() network.Pod {
	rec := p.record()
	cfg := rec.Config.M
	n := network.Pod{
		ID: rec.ID, Name: cfg.GetMetadata().GetName(), Namespace: cfg.GetMetadata().GetNamespace(), UID: cfg.GetMetadata().GetUid(),
		NetNS: p.nsPath("net"), CgroupParent: cfg.GetLinux().GetCgroupParent(), Annotations: cfg.GetAnnotations(), Conflist: rec.Conflist,
	}
	if d := cfg.GetDnsConfig(); d != nil {
		n.DNS = &network.DNS{Servers: d.GetServers(), Searches: d.GetSearches(), Options: d.GetOptions()}
	}
	for _, pm := range cfg.GetPortMappings() {
		if pm.GetHostPort() == 0 {
			continue
		}
		n.PortMappings = append(n.PortMappings, network.PortMapping{
			Protocol:      strings.ToLower(cri.Protocol_name[int32(pm.GetProtocol())]),
			ContainerPort: pm.GetContainerPort(), HostPort: pm.GetHostPort(), HostIP: pm.GetHostIp(),
		})
	}
	return n
}

// networkTimeout is how long the plugins of a pod may take together.
const networkTimeout = 90 * time.Second

func (p *pod) connect(ctx context.Context) error {
	if spec.HostNetwork(p.config()) {
		return nil
	}
	// What ADD is about to use, on record first: only that can undo it, whatever the node has by then.
	conflist, err := p.m.opts.Network.Conflist()
	if err != nil {
		return err
	}
	if err := p.update(func(r *podRecord) { r.Conflist = conflist }); err != nil {
		return err
	}
	// A plugin that is killed half way can leave what no later ADD gets over (a bridge without an address), so that
	// it is not for a caller who has lost patience. One that hangs is left behind by this step, and killed at last.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), networkTimeout)
	defer cancel()
	res, err := p.m.opts.Network.Setup(ctx, p.network())
	if err != nil {
		return err
	}
	return p.update(func(r *podRecord) { r.IPs, r.Conflist = res.IPs, res.Conflist })
}

func (p *pod) disconnect(ctx context.Context) error {
	if spec.HostNetwork(p.config()) {
		return nil
	}
	n := p.network()
	rec := p.record()
	if len(rec.Conflist) == 0 {
		return nil // connect had not come to running a plugin: what the node has now, it was not added to
	}
	switch {
	case rec.Boot != p.m.boot:
		n.NetNS = "" // the node was restarted: no path of then may be given to a plugin now
	case !p.isPinned(rec):
		// Somebody has taken the pin away, or put another's there. While the shim is there, the namespace is, too.
		procs, err := cgroups.Processes(cgroups.Path(rec.Cgroup))
		if err != nil || !slices.Contains(procs, rec.ShimPID) || p.pinOf(rec.ShimPID, "net") != nil || !p.isPinned(rec) {
			n.NetNS = ""
		}
	}
	err := p.m.opts.Network.Teardown(ctx, n)
	if err == nil || !p.longEnough() {
		return err
	}
	if owed := p.m.opts.Network.Owe(n, err); owed != nil {
		return errors.Join(err, owed)
	}
	return p.update(func(r *podRecord) { r.Reason += "; its network is released in the background" })
}

// startWatch connects to the shim and follows what it tells. It returns the state of each container now.
func (p *pod) startWatch() ([]shim.State, error) {
	w, states, err := p.shim().Watch()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.watch = w
	p.shimGone = make(chan struct{})
	gone := p.shimGone
	p.mu.Unlock()
	if pause := w.Pause(); pause > 0 && pause != p.record().PausePID {
		// The next daemon is told, too: a disk that is full must not cost the pod.
		if err := p.update(func(r *podRecord) { r.PausePID = pause }); err != nil {
			p.m.log.Warn("pause process of a pod is not put on record", "pod", name(p.config()), "id", p.rec.ID, "error", err)
		}
	}
	p.m.watchers.Go(func() {
		defer close(gone)
		for {
			state, err := w.Next()
			if err != nil {
				break
			}
			p.m.observeState(p, state)
		}
		w.Close()
		p.mu.Lock()
		expected := p.watch != w
		p.mu.Unlock()
		if !expected {
			p.shimDied()
		}
	})
	return states, nil
}

// unwatch ends the watch: that the shim ends is expected from now on.
func (p *pod) unwatch() {
	p.mu.Lock()
	w := p.watch
	p.watch = nil
	p.mu.Unlock()
	if w != nil {
		w.Close()
	}
}

// shimDied cleans up after a shim that has ended by itself: without it nobody writes the containers' logs or tells
// their ends, so that they are killed, and the pod is not ready.
func (p *pod) shimDied() {
	m := p.m
	rec := p.record()
	if rec.Phase == creating {
		return // the call that makes it finds out
	}
	m.log.Warn("the shim of a pod has ended; its containers are killed and the pod is not ready", "pod", name(rec.Config.M), "id", rec.ID, "shim", rec.ShimPID)
	ctx, cancel := context.WithTimeout(context.Background(), step.DefaultTimeout)
	defer cancel()
	if err := p.lock.Lock(ctx); err != nil {
		m.log.Error("pod without a shim cannot be cleaned up yet", "id", rec.ID, "error", err)
		return
	}
	defer p.lock.Unlock()
	if p.record().Phase != ready {
		return
	}
	if err := p.stop(ctx, "ShimDied", "its shim has ended"); err != nil {
		m.log.Warn("pod without a shim is not all cleaned up; it is tried again when it is stopped", "id", rec.ID, "error", err)
	}
}
