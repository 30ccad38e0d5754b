package spec

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// mountOptions are the additional options that a mount may ask for: those that only take away. Others would change what
// the fields say (rw, rro, rshared, bind), and libcontainer passes what it does not know to the kernel.
var mountOptions = []string{"noexec", "nosuid", "nodev", "nosymfollow", "noatime", "nodiratime", "relatime"}

func validateMounts(cfg *cri.ContainerConfig) error {
	for i, m := range cfg.GetMounts() {
		if err := validateMount(index("config.mounts", i), m); err != nil {
			return err
		}
	}
	return nil
}

func validateMount(at string, m *cri.Mount) error {
	if err := absolute(at+".container_path", m.GetContainerPath()); err != nil {
		return err
	}
	if path.Clean(m.GetContainerPath()) == "/" {
		return invalid(at+".container_path", m.GetContainerPath(), "is the root of the container")
	}
	if err := validateProcMount(at+".container_path", m); err != nil {
		return err
	}
	if image := m.GetImage(); image.GetImage() != "" {
		if m.GetHostPath() != "" {
			return invalid(at+".host_path", m.GetHostPath(), "is given together with image %s", show(image.GetImage()))
		}
		if !m.GetReadonly() {
			return invalid(at+".readonly", m.GetReadonly(), "is not possible: an image volume is read-only")
		}
		if m.GetPropagation() != cri.MountPropagation_PROPAGATION_PRIVATE {
			return invalid(at+".propagation", m.GetPropagation(), "is not possible for an image volume")
		}
		if sub := m.GetImageSubPath(); sub != "" && (controls(sub) || !filepath.IsLocal(sub)) {
			return invalid(at+".image_sub_path", sub, "is not a path inside the image")
		}
	} else {
		if m.GetImageSubPath() != "" {
			return invalid(at+".image_sub_path", m.GetImageSubPath(), "is given without an image")
		}
		// A file of the host may have any name but this one byte.
		if p := m.GetHostPath(); !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 || len(p) > maxPath {
			return invalid(at+".host_path", p, "is not an absolute path of at most %d bytes", maxPath)
		}
	}
	switch m.GetPropagation() {
	case cri.MountPropagation_PROPAGATION_PRIVATE, cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
		cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:
	default:
		return invalid(at+".propagation", int32(m.GetPropagation()), "is not a propagation")
	}
	if m.GetRecursiveReadOnly() {
		if !m.GetReadonly() {
			return invalid(at+".recursive_read_only", true, "contradicts readonly: false")
		}
		if m.GetPropagation() != cri.MountPropagation_PROPAGATION_PRIVATE {
			return invalid(at+".recursive_read_only", true, "needs propagation PROPAGATION_PRIVATE, not %v", m.GetPropagation())
		}
	}
	for i, o := range m.GetMountOptions() {
		if !slices.Contains(mountOptions, o) {
			return invalid(index(at+".mount_options", i), o, "is not one of %s", strings.Join(mountOptions, ", "))
		}
	}
	return nil
}

// procFiles are the files below /proc that a mount may replace, since programs like lxcfs emulate them; libcontainer
// has the same list.
var procFiles = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime", "/proc/loadavg", "/proc/slabinfo",
	"/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled",
}

// validateProcMount refuses what would put something else in the place of /proc or of a part of it: runtimes write to
// files there to confine the container (CVE-2019-16884).
func validateProcMount(at string, m *cri.Mount) error {
	p := path.Clean(m.GetContainerPath())
	switch {
	case p == "/proc" && (m.GetImage().GetImage() != "" || path.Clean(m.GetHostPath()) != "/proc"):
		return invalid(at, m.GetContainerPath(), "can only be the host's /proc")
	case strings.HasPrefix(p, "/proc/") && !slices.Contains(procFiles, p):
		return invalid(at, m.GetContainerPath(), "is a part of /proc")
	}
	return nil
}

// validateVolumes refuses an image that declares a volume in the place of its root or of /proc, as every runtime does that
// mounts volumes. Others are allowed, and declare nothing: what a pod mounts is for the request to say.
func validateVolumes(volumes map[string]struct{}) error {
	for _, v := range slices.Sorted(maps.Keys(volumes)) {
		if p := path.Join("/", v); p == "/" || p == "/proc" || strings.HasPrefix(p, "/proc/") {
			return invalid("image VOLUME", v, "is the root, /proc or a part of it")
		}
	}
	return nil
}

// maxPath is PATH_MAX of Linux without its NUL byte. Longer ones overflowed counters on their way to the kernel
// (CVE-2021-43784).
const maxPath = 4095

// maxName is NAME_MAX of Linux.
const maxName = 255

// tooLong says whether a path is longer than the kernel takes, or a name in it is.
func tooLong(p string) bool {
	return len(p) > maxPath || slices.ContainsFunc(strings.Split(p, "/"), func(name string) bool { return len(name) > maxName })
}

// absolute refuses a path of the container that is empty, relative, too long or holds control characters.
func absolute(at, p string) error {
	if controls(p) {
		return invalid(at, p, "contains a control character")
	}
	if tooLong(p) {
		return invalid(at, p, "is longer than a path or a name in it may be (%d and %d bytes)", maxPath, maxName)
	}
	if !path.IsAbs(p) {
		return invalid(at, p, "is not absolute")
	}
	return nil
}

// kernelMounts are the file systems that every container has, unless the request mounts something in their place.
func kernelMounts(in Input) []specs.Mount {
	access := "ro"
	if in.Container.GetLinux().GetSecurityContext().GetPrivileged() {
		access = "rw" // "any sysfs and procfs mounts are mounted RW", and cgroupfs with them
	}
	cgroup := []string{"nosuid", "noexec", "nodev", "relatime", access}
	if !hasCgroupNamespace(in) {
		for _, o := range in.Host.CgroupMountOptions {
			if o == "nsdelegate" || o == "memory_recursiveprot" {
				cgroup = append(cgroup, o)
			}
		}
	}
	// "tty", which is group 5 in every distribution, may write to terminals, where the pod has such a group.
	terminals := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	userns, own := Userns(in.Sandbox)
	if !own || userns.GIDs.Length > 5 {
		terminals = append(terminals, "gid=5")
	}
	sys := specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}}
	if own && HostNetwork(in.Sandbox) {
		// A sysfs shows a network namespace, and only the user namespace that this one belongs to may mount it.
		sys.Type, sys.Source, sys.Options = "bind", "/sys", []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", "rro"}
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: terminals},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{
			"nosuid", "noexec", "nodev", "mode=1777", "size=65536k",
		}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		sys,
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: cgroup},
	}
}

// mounts decides everything that is mounted in a container, in order, and the propagation of its root: kernel file
// systems, then the pod's files and the request's mounts with parents before children, otherwise as requested.
func mounts(in Input) (list []specs.Mount, rootPropagation string, err error) {
	requested := in.Container.GetMounts()
	if len(in.Sources) != len(requested) {
		return nil, "", fmt.Errorf("spec.Input: facts of %d mounts for %d in the request", len(in.Sources), len(requested))
	}
	taken := map[string]bool{} // by a mount of the request, or by a file of the pod
	for i, m := range requested {
		taken[path.Clean(m.GetContainerPath())] = true
		bound, err := bind(index("config.mounts", i), m, in.Sources[i], in.Host)
		if err != nil {
			return nil, "", err
		}
		if Relabels(m) && in.Labels.Mount != "" && !mayRelabel(in.Sources[i].Path) {
			return nil, "", invalid(index("config.mounts", i)+".selinux_relabel", in.Sources[i].Path, "is the system's, and is not relabelled")
		}
		idMap(&bound, m, sandboxNamespaces(in.Sandbox).GetUsernsOptions())
		list = append(list, bound)
		switch m.GetPropagation() {
		case cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			rootPropagation = "rshared"
		case cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			if rootPropagation == "" {
				rootPropagation = "rslave"
			}
		}
	}
	for _, m := range podMounts(in) {
		if !taken[m.Destination] {
			taken[m.Destination] = true
			list = append(list, m)
		}
	}
	slices.SortStableFunc(list, func(a, b specs.Mount) int { return depth(a.Destination) - depth(b.Destination) })

	below := slices.DeleteFunc(kernelMounts(in), func(m specs.Mount) bool {
		return taken[m.Destination] || taken["/dev"] && strings.HasPrefix(m.Destination, "/dev/")
	})
	return append(below, list...), rootPropagation, nil
}

// Relabels says whether a mount asks for the container's SELinux label. An image volume has it anyway.
func Relabels(m *cri.Mount) bool { return m.GetSelinuxRelabel() && m.GetImage().GetImage() == "" }

func depth(p string) int { return strings.Count(p, "/") }

// podMounts are the files that all containers of a pod share.
func podMounts(in Input) []specs.Mount {
	access := "rw"
	if in.Container.GetLinux().GetSecurityContext().GetReadonlyRootfs() {
		access = "ro"
	}
	var list []specs.Mount
	for _, f := range []struct{ at, source string }{
		{"/etc/hosts", in.PodFiles.Hosts},
		{"/etc/hostname", in.PodFiles.Hostname},
		{"/etc/resolv.conf", in.PodFiles.ResolvConf},
	} {
		if f.source != "" {
			list = append(list, specs.Mount{
				Destination: f.at, Type: "bind", Source: f.source, Options: []string{"rbind", "rprivate", access},
			})
		}
	}
	if in.PodFiles.Shm != "" {
		options := []string{"rbind", "rprivate", "rw"}
		if !HostIPC(in.Sandbox) { // the host's /dev/shm keeps the flags that the host chose
			options = append(options, "nosuid", "noexec", "nodev")
		}
		list = append(list, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: in.PodFiles.Shm, Options: options})
	}
	return list
}

// bind is one mount of the request.
func bind(at string, m *cri.Mount, src Source, h Host) (specs.Mount, error) {
	if !path.IsAbs(src.Path) {
		return specs.Mount{}, fmt.Errorf("spec.Input: source %q of %s is not absolute", src.Path, at)
	}
	options := []string{"rbind"}
	switch m.GetPropagation() {
	case cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		if !src.Shared {
			return specs.Mount{}, unmet(at+".propagation", m.GetPropagation(), "needs %q to be on a shared mount", m.GetHostPath())
		}
		options = append(options, "rshared")
	case cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		if !src.Shared && !src.Slave {
			return specs.Mount{}, unmet(at+".propagation", m.GetPropagation(), "needs %q to be on a shared or slave mount", m.GetHostPath())
		}
		options = append(options, "rslave")
	default:
		options = append(options, "rprivate")
	}
	switch {
	case m.GetRecursiveReadOnly():
		if !h.RecursiveReadOnly {
			return specs.Mount{}, unmet(at+".recursive_read_only", true, "needs Linux 5.12")
		}
		options = append(options, "rro")
	case m.GetReadonly():
		options = append(options, "ro")
	default:
		options = append(options, "rw")
	}
	options = append(options, m.GetMountOptions()...)
	return specs.Mount{Destination: path.Clean(m.GetContainerPath()), Type: "bind", Source: src.Path, Options: options}, nil
}
