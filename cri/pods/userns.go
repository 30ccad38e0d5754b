package pods

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/network"
)

// usernsRanges are the ids of the host that pods have in user namespaces of their own. Pods have them for as long as their
// namespaces are there.
type usernsRanges struct {
	mu     sync.Mutex
	claims map[string]usernsClaim // by the pod's id
}

type usernsClaim struct {
	pod, uid string // name and uid of the pod
	spec.UserNamespace
}

// claim takes a pod's ranges, unless another pod has one of these ids. A new sandbox of the same pod may have the old one's.
func (r *usernsRanges) claim(id string, cfg *cri.PodSandboxConfig) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for other, c := range r.claims {
		if other == id || c.uid != "" && c.uid == cfg.GetMetadata().GetUid() {
			continue
		}
		if err := spec.ApartFrom(cfg, c.pod, c.UserNamespace); err != nil {
			return err
		}
	}
	r.add(id, cfg)
	return nil
}

// keep takes the ranges of a pod that is there, whoever else has them.
func (r *usernsRanges) keep(id string, cfg *cri.PodSandboxConfig) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.add(id, cfg)
}

func (r *usernsRanges) add(id string, cfg *cri.PodSandboxConfig) {
	userns, own := spec.Userns(cfg)
	if !own {
		return
	}
	if r.claims == nil {
		r.claims = map[string]usernsClaim{}
	}
	r.claims[id] = usernsClaim{name(cfg), cfg.GetMetadata().GetUid(), userns}
}

func (r *usernsRanges) free(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.claims, id)
}

// UserNamespaces says why pods cannot have user namespaces of their own on this node, or nil.
func (m *Manager) UserNamespaces() error { return m.noUserns }

func (m *Manager) checkUserns(cfg *cri.PodSandboxConfig) error {
	if _, own := spec.Userns(cfg); own && m.noUserns != nil {
		return failedPrecondition("config.linux.security_context.namespace_options.userns_options: this node has no user namespaces for pods: %v", m.noUserns)
	}
	return nil
}

// networkUserns is a pod's user namespace as the network package makes it.
func (m *Manager) networkUserns(path string, u spec.UserNamespace) *network.UserNamespace {
	return &network.UserNamespace{Path: path, UIDs: network.IDs(u.UIDs), GIDs: network.IDs(u.GIDs), Holder: m.launcher.path()}
}

// imageUserns is the pod's user namespace as the image store mounts for it, or nil.
func (p *pod) imageUserns() *images.Userns {
	u, own := spec.Userns(p.config())
	if !own {
		return nil
	}
	return &images.Userns{Path: p.nsPath("user"), UIDs: images.IDs(u.UIDs), GIDs: images.IDs(u.GIDs)}
}

// probeUserns finds out why pods cannot have user namespaces of their own: by making one, and by mounting an image for it.
func (m *Manager) probeUserns() (err error) {
	// Init is a user without rights on the host when it comes to its root file system.
	for dir := m.runDir("containers"); dir != "/"; dir = filepath.Dir(dir) {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		if st.Mode&0o001 == 0 {
			return fmt.Errorf("%s has mode %04o, which users without rights cannot pass: chmod it to %04o", dir, st.Mode&0o7777, st.Mode&0o7777|0o001)
		}
	}
	dir := m.runDir("probe")
	if err := os.MkdirAll(filepath.Join(dir, "view"), 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, "user")
	defer func() { err = errors.Join(err, network.Unpin(path), os.RemoveAll(dir)) }()
	if err := network.Unpin(path); err != nil { // of a daemon that was killed
		return err
	}
	some := spec.IDs{Host: 1 << 16, Length: 1 << 16}
	if err := network.Pin(network.NamespaceSet{User: m.networkUserns(path, spec.UserNamespace{UIDs: some, GIDs: some})}); err != nil {
		return err
	}
	if err := m.opts.Images.CanMap(path, filepath.Join(dir, "view")); err != nil {
		return fmt.Errorf("mount an image with mapped ids (Linux 5.19, and a file system that can): %w", err)
	}
	return nil
}

// giveToRoot gives a file of the pod to the root of its user namespace.
func (p *pod) giveToRoot(path string) error {
	u, own := spec.Userns(p.config())
	if !own {
		return nil
	}
	return os.Lchown(path, int(u.UIDs.Host), int(u.GIDs.Host))
}

// openToInit lets the root of the pod's user namespace, and on the host nobody else, pass through the bundle: init is that
// user when it enters its root file system.
func (c *container) openToInit() error {
	u, own := spec.Userns(c.pod.config())
	if !own {
		return nil
	}
	if err := os.Lchown(c.dir(), 0, int(u.GIDs.Host)); err != nil {
		return err
	}
	return os.Chmod(c.dir(), 0o710)
}

// checkIDMapped finds out which mounts cannot be had with the mapping that they ask for, so that the error names mount and
// file system.
func (b *build) checkIDMapped(mounts []*cri.Mount, sources []spec.Source) error {
	for i, m := range mounts {
		if len(m.GetUidMappings()) == 0 || m.GetImage().GetImage() != "" {
			continue
		}
		if err := canMap(sources[i].Path, b.pod.nsPath("user")); err != nil {
			return fmt.Errorf("config.mounts[%d].uidMappings: %s at %s: %w", i, m.GetHostPath(), m.GetContainerPath(), err)
		}
	}
	return nil
}

// canMap says why a file or directory cannot be mounted with mapped ids, or nil.
func canMap(path, userns string) error {
	ns, err := os.Open(userns)
	if err != nil {
		return err
	}
	defer ns.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	defer unix.Close(tree)
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
	if err == nil {
		return nil
	}
	return fmt.Errorf("file system %s cannot map ids (%w): %w", fileSystem(tree), err, errdefs.ErrFailedPrecondition)
}

// fileSystem is the kind of file system that a descriptor is on.
func fileSystem(fd int) string {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return "unknown"
	}
	name := map[int64]string{
		unix.TMPFS_MAGIC: "tmpfs (before Linux 6.3)", unix.NFS_SUPER_MAGIC: "nfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.FUSE_SUPER_MAGIC: "fuse",
		unix.CEPH_SUPER_MAGIC: "ceph", unix.SMB2_SUPER_MAGIC: "cifs", unix.CIFS_SUPER_MAGIC: "cifs", unix.V9FS_MAGIC: "9p",
		unix.PROC_SUPER_MAGIC: "proc", unix.SYSFS_MAGIC: "sysfs", unix.RAMFS_MAGIC: "ramfs", unix.HUGETLBFS_MAGIC: "hugetlbfs",
	}[int64(st.Type)]
	if name == "" {
		name = fmt.Sprintf("of type %#x", st.Type)
	}
	return name
}
