package pods

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/apparmor"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/spec"
)

// hostFacts reads what specifications depend on and what does not change while the daemon runs.
func hostFacts() (spec.Host, error) {
	h := spec.Host{CgroupVersion: cgroups.Version()}
	var err error
	if h.Hostname, err = os.Hostname(); err != nil {
		return h, err
	}
	caps, err := capability.NewPid2(0)
	if err == nil {
		err = caps.Load()
	}
	if err != nil {
		return h, fmt.Errorf("capabilities: %w", err)
	}
	h.Capabilities = []string{}
	for _, c := range capability.ListKnown() {
		if caps.Get(capability.BOUNDING, c) {
			h.Capabilities = append(h.Capabilities, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	var stack unix.Rlimit // containers have the daemon's
	if err := unix.Getrlimit(unix.RLIMIT_STACK, &stack); err != nil {
		return h, os.NewSyscallError("getrlimit", err)
	}
	h.ArgumentSpace = spec.ArgumentSpace(stack.Cur)
	h.OOMScoreAdjFloor = -1000
	if !caps.Get(capability.EFFECTIVE, capability.CAP_SYS_RESOURCE) {
		own, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			return h, err
		}
		if h.OOMScoreAdjFloor, err = strconv.Atoi(strings.TrimSpace(string(own))); err != nil {
			return h, err
		}
	}
	// Action SECCOMP_GET_ACTION_AVAIL needs no privilege and tells whether filters are there.
	_, err = os.Stat("/proc/sys/kernel/seccomp/actions_avail")
	h.SeccompEnabled = err == nil
	// As containerd decides: without the parser nobody can load a profile, so that the default one would keep every
	// container from starting.
	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err == nil && strings.HasPrefix(string(enabled), "Y") {
		_, err = exec.LookPath("apparmor_parser")
		h.AppArmorEnabled = err == nil
	}
	if h.SELinux, err = selinuxFacts(); err != nil {
		return h, err
	}
	h.RecursiveReadOnly = unix.MountSetattr(-1, "", 0, &unix.MountAttr{}) != unix.ENOSYS
	if sizes, err := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB"); err == nil && hasHugetlb(h.CgroupVersion) {
		for _, s := range sizes {
			if kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(s), "hugepages-"), "kB"), 10, 64); err == nil {
				h.HugePageSizes = append(h.HugePageSizes, pageSize(kb))
			}
		}
	}
	h.SwapController = hasSwap(h.CgroupVersion)
	if h.CgroupVersion == 2 {
		mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter("/sys/fs/cgroup"))
		if err != nil {
			return h, err
		}
		for _, m := range mounts {
			for o := range strings.SplitSeq(m.VFSOptions, ",") {
				if o == "nsdelegate" || o == "memory_recursiveprot" {
					h.CgroupMountOptions = append(h.CgroupMountOptions, o)
				}
			}
		}
	}
	h.Devices, err = deviceNodes("/dev", func(path string) bool {
		return slices.Contains([]string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/console", "/dev/.lxc", "/dev/.lxd-mounts", "/dev/.udev"}, path)
	})
	return h, err
}

// loadAppArmor loads the profile that containers get by default, if it is not there already.
func loadAppArmor() error {
	loaded, err := apparmor.IsLoaded(spec.DefaultAppArmorProfile)
	if err != nil || loaded {
		return err
	}
	return apparmor.InstallDefault(spec.DefaultAppArmorProfile)
}

// pageSize writes a size of huge pages as the controller's files do.
func pageSize(kb uint64) string {
	switch {
	case kb >= 1<<20:
		return strconv.FormatUint(kb>>20, 10) + "GB"
	case kb >= 1<<10:
		return strconv.FormatUint(kb>>10, 10) + "MB"
	}
	return strconv.FormatUint(kb, 10) + "KB"
}

func hasHugetlb(version int) bool {
	if version == 2 {
		c, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		return slices.Contains(strings.Fields(string(c)), "hugetlb")
	}
	dir, err := cgroups.Dir("/", "hugetlb")
	return err == nil && dir != ""
}

// hostNow are the facts about the host, with the one that can change: on v2 nothing tells whether swap is accounted before
// there is a cgroup below the root with the memory controller, which the first pod may be the first to have.
func (m *Manager) hostNow() spec.Host {
	h := m.host
	h.SwapController = h.SwapController || hasSwap(h.CgroupVersion)
	return h
}

func hasSwap(version int) bool {
	if version == 2 {
		found, _ := filepath.Glob("/sys/fs/cgroup/*/memory.swap.max")
		return len(found) > 0
	}
	dir, err := cgroups.Dir("/", "memory")
	if err != nil {
		return false
	}
	_, err = os.Stat(filepath.Join(dir, "memory.memsw.limit_in_bytes"))
	return err == nil
}

// deviceNodes lists the device nodes below a directory.
func deviceNodes(dir string, skip func(string) bool) ([]specs.LinuxDevice, error) {
	var list []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission):
			return nil // devices come and go
		case err != nil:
			return err
		case skip(path):
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		case e.Type()&fs.ModeDevice == 0:
			return nil
		}
		d, err := deviceNode(path)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		list = append(list, *d)
		return nil
	})
	return list, err
}

func deviceNode(path string) (*specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	kind := map[uint32]string{unix.S_IFBLK: "b", unix.S_IFCHR: "c"}[st.Mode&unix.S_IFMT]
	if kind == "" {
		return nil, fmt.Errorf("%s is not a device: %w", path, errdefs.ErrInvalidArgument)
	}
	mode := os.FileMode(st.Mode & 0o777)
	uid, gid := st.Uid, st.Gid
	return &specs.LinuxDevice{
		Path: path, Type: kind, Major: int64(unix.Major(uint64(st.Rdev))), Minor: int64(unix.Minor(uint64(st.Rdev))),
		FileMode: &mode, UID: &uid, GID: &gid,
	}, nil
}

// clampOOMScore is the score itself where it may be set, else the least that may, which is said once.
func (m *Manager) clampOOMScore(want int) int {
	if want >= m.host.OOMScoreAdjFloor {
		return want
	}
	m.clampOnce.Do(func() {
		m.log.Info("oom_score_adj cannot be lowered without CAP_SYS_RESOURCE: sandboxes and critical pods are as likely to be killed for memory as the daemon itself", "lowest", m.host.OOMScoreAdjFloor)
	})
	return m.host.OOMScoreAdjFloor
}

// input collects what the specification of a container is computed from.
func (b *build) input() (spec.Input, error) {
	p, cfg := b.pod, b.rec.Config.M
	in := spec.Input{
		ID: b.rec.ID, Sandbox: p.config(), Container: cfg, Image: b.image.Config.Config, Host: b.m.hostNow(),
		RootfsPath: b.dir("rootfs"), CgroupPath: b.rec.Cgroup, PodFiles: p.files(),
		Labels:     b.labels(),
		Namespaces: spec.Namespaces{Net: p.nsPath("net"), IPC: p.nsPath("ipc"), UTS: p.nsPath("uts"), User: p.nsPath("user")},
	}
	if spec.SharedPID(p.config()) {
		in.Namespaces.PID = p.nsPath("pid")
	}
	var err error
	opts := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if opts.GetPid() == cri.NamespaceMode_TARGET {
		var target *container
		if target, err = b.m.container(opts.GetTargetId()); err != nil {
			return in, fmt.Errorf("config.linux.security_context.namespace_options.target_id: %w", err)
		}
		v := target.view.Load()
		if v.SandboxID != p.rec.ID || v.State != cri.ContainerState_CONTAINER_RUNNING {
			return in, failedPrecondition("config.linux.security_context.namespace_options.target_id: container %s does not run in this pod", v.ID)
		}
		in.Namespaces.Target = fmt.Sprintf("/proc/%d/ns/pid", v.PID)
		if b.target, err = pidNamespace(v.PID); err == nil {
			err = cgroups.Verify(v.CgroupPath, v.PID)
		}
		if err != nil {
			return in, failedPrecondition("config.linux.security_context.namespace_options.target_id: container %s: %w", v.ID, err)
		}
	}
	if in.Passwd, err = readInRoot(in.RootfsPath, "etc/passwd"); err != nil {
		return in, err
	}
	if in.Group, err = readInRoot(in.RootfsPath, "etc/group"); err != nil {
		return in, err
	}
	if in.Sources, err = b.sources(cfg.GetMounts()); err != nil {
		return in, err
	}
	b.volumes = in.Sources
	if err := b.checkIDMapped(cfg.GetMounts(), in.Sources); err != nil {
		return in, err
	}
	for i, d := range cfg.GetDevices() {
		nodes, err := requestedDevices(d.GetHostPath())
		if err != nil {
			return in, fmt.Errorf("config.devices[%d].host_path: %w", i, err)
		}
		in.Devices = append(in.Devices, nodes)
	}
	profile, err := spec.SeccompProfilePath(cfg)
	if err == nil && profile != "" {
		if in.SeccompProfile, err = readSmall(profile); err != nil {
			err = fmt.Errorf("config.linux.security_context.seccomp.localhost_ref: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	if err != nil {
		return in, err
	}
	name, err := spec.AppArmorProfile(cfg, b.m.host)
	if err != nil {
		return in, err
	}
	if name != "" {
		in.AppArmorLoaded, err = apparmor.IsLoaded(name)
	}
	return in, err
}

// pidNamespace is the PID namespace of a process. Beside a path with a pid, which another process may have by the time
// that the path is opened, it tells whether that was the one meant.
func pidNamespace(pid int) (uint64, error) {
	var st unix.Stat_t
	path := fmt.Sprintf("/proc/%d/ns/pid", pid)
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// requestedDevices are the node that a path leads to, or all below it.
func requestedDevices(path string) ([]specs.LinuxDevice, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if fi, err := os.Stat(real); err == nil && fi.IsDir() {
		nodes, err := deviceNodes(real, func(string) bool { return false })
		for i := range nodes {
			nodes[i].Path = strings.TrimPrefix(nodes[i].Path, real)
		}
		return nodes, err
	}
	d, err := deviceNode(real)
	if err != nil {
		return nil, err
	}
	d.Path = ""
	return []specs.LinuxDevice{*d}, nil
}

// sources looks at the host paths of mounts. A path that does not exist is made, a directory, as containerd does and
// users of hostPath volumes count on.
func (b *build) sources(mounts []*cri.Mount) ([]spec.Source, error) {
	list := make([]spec.Source, len(mounts))
	propagation := false
	for i, m := range mounts {
		if m.GetImage().GetImage() != "" {
			path, err := imageSubPath(b.volumePath(i), m.GetImageSubPath())
			if err != nil {
				return nil, fmt.Errorf("ImageVolumeMountFailed: config.mounts[%d].image_sub_path: %w", i, err)
			}
			list[i].Path = path
			continue
		}
		real, err := filepath.EvalSymlinks(m.GetHostPath())
		if errors.Is(err, fs.ErrNotExist) {
			if err = os.MkdirAll(m.GetHostPath(), 0o755); err == nil {
				real, err = filepath.EvalSymlinks(m.GetHostPath())
			}
		}
		if err != nil {
			return nil, fmt.Errorf("config.mounts[%d].host_path: %w", i, err)
		}
		list[i].Path = real
		propagation = propagation || m.GetPropagation() != cri.MountPropagation_PROPAGATION_PRIVATE
	}
	if !propagation {
		return list, nil
	}
	table, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	for i := range list {
		var holder *mountinfo.Info // the mount whose mount point is the longest that the path is below
		for _, m := range table {
			if (m.Mountpoint == "/" || list[i].Path == m.Mountpoint || strings.HasPrefix(list[i].Path, m.Mountpoint+"/")) &&
				(holder == nil || len(m.Mountpoint) >= len(holder.Mountpoint)) {
				holder = m
			}
		}
		if holder != nil {
			list[i].Shared = strings.Contains(holder.Optional, "shared:")
			list[i].Slave = strings.Contains(holder.Optional, "master:")
		}
	}
	return list, nil
}

// imageSubPath resolves a sub path inside an image volume; a link cannot lead out of it.
func imageSubPath(root, sub string) (string, error) {
	if sub == "" {
		return root, nil
	}
	if !filepath.IsLocal(sub) {
		return "", fmt.Errorf("%q leaves the image: %w", sub, errdefs.ErrInvalidArgument)
	}
	at, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(at)
	fd, err := unix.Openat2(at, sub, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return "", fmt.Errorf("%q: %w: %w", sub, err, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(fd)
	return os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
}

// maxUserFile bounds what is read of an image's passwd and group (CVE-2026-47262).
const maxUserFile = 10 << 20

// readInRoot reads a regular file of a root file system, which may be hostile: links cannot lead out of it, and fifos
// and devices are not opened. Nil means that there is none.
func readInRoot(root, name string) ([]byte, error) {
	at, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(at)
	resolve := uint64(unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS)
	fd, err := unix.Openat2(at, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve})
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR:
		return nil, nil
	default:
		return nil, fmt.Errorf("/%s of the image: %w", name, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("/%s of the image is not a regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	if st.Size > maxUserFile {
		return nil, fmt.Errorf("/%s of the image has %d bytes, more than the %d allowed: %w", name, st.Size, maxUserFile, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxUserFile))
	if data == nil {
		data = []byte{}
	}
	return data, err
}

// readSmall reads a file of the host that has to be small.
func readSmall(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const limit = 1 << 20
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, err
}
