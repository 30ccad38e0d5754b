package spec

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// IDs is a range of user or group ids: the first Length ids inside a user namespace are those from Host on outside.
type IDs struct{ Host, Length uint32 }

// Overlap says whether two ranges have an id of the host in common.
func (r IDs) Overlap(o IDs) bool {
	return uint64(r.Host) < uint64(o.Host)+uint64(o.Length) && uint64(o.Host) < uint64(r.Host)+uint64(r.Length)
}

func (r IDs) String() string {
	return fmt.Sprintf("%d..%d", r.Host, uint64(r.Host)+uint64(r.Length)-1)
}

// UserNamespace is what a pod's own user namespace maps.
type UserNamespace struct{ UIDs, GIDs IDs }

// Userns is the user namespace that a pod has for itself. Without one it is in the node's: so says mode NODE, and so do
// older kubelets by saying nothing. The configuration has to be valid.
func Userns(cfg *cri.PodSandboxConfig) (u UserNamespace, own bool) {
	o := sandboxNamespaces(cfg).GetUsernsOptions()
	if o.GetMode() != cri.NamespaceMode_POD || len(o.GetUids()) != 1 || len(o.GetGids()) != 1 {
		return UserNamespace{}, false
	}
	ids := func(m *cri.IDMapping) IDs { return IDs{m.GetHostId(), m.GetLength()} }
	return UserNamespace{ids(o.GetUids()[0]), ids(o.GetGids()[0])}, true
}

// ApartFrom refuses a pod whose user namespace shares ids of the host with that of another pod: either could then do what
// it likes with the other's processes and files, once it is out of its container.
func ApartFrom(cfg *cri.PodSandboxConfig, other string, theirs UserNamespace) error {
	const at = "config.linux.security_context.namespace_options.userns_options"
	ours, own := Userns(cfg)
	switch {
	case !own:
	case ours.UIDs.Overlap(theirs.UIDs):
		return invalid(at+".uids[0].host_id", ours.UIDs, "overlaps with %v, which pod %s has", theirs.UIDs, other)
	case ours.GIDs.Overlap(theirs.GIDs):
		return invalid(at+".gids[0].host_id", ours.GIDs, "overlaps with %v, which pod %s has", theirs.GIDs, other)
	}
	return nil
}

// validateUserns refuses what no pod can have. Nil and mode NODE are the node's user namespace.
func validateUserns(at string, u *cri.UserNamespace) error {
	if u == nil {
		return nil
	}
	switch u.GetMode() {
	case cri.NamespaceMode_NODE:
		if len(u.GetUids()) > 0 {
			return invalid(at+".uids", len(u.GetUids()), "mappings are given with mode NODE")
		}
		if len(u.GetGids()) > 0 {
			return invalid(at+".gids", len(u.GetGids()), "mappings are given with mode NODE")
		}
		return nil
	case cri.NamespaceMode_POD:
	default:
		return invalid(at+".mode", u.GetMode(), "is neither POD nor NODE")
	}
	if err := validateIDMap(at+".uids", u.GetUids()); err != nil {
		return err
	}
	return validateIDMap(at+".gids", u.GetGids())
}

func validateIDMap(at string, list []*cri.IDMapping) error {
	if len(list) != 1 {
		return invalid(at, len(list), "mappings are given with mode POD; one is needed")
	}
	m := list[0]
	switch {
	case m.GetContainerId() != 0:
		return invalid(index(at, 0)+".container_id", m.GetContainerId(), "leaves id 0 of the container unmapped")
	case m.GetHostId() == 0:
		return invalid(index(at, 0)+".host_id", m.GetHostId(), "is root of the node, which a user namespace is there to keep away from")
	}
	return validateRange(index(at, 0), m)
}

// validateRange refuses a range that is empty or goes beyond the last id: 2^32-1 is none, it means "no id".
func validateRange(at string, m *cri.IDMapping) error {
	if m.GetLength() == 0 {
		return invalid(at+".length", m.GetLength(), "maps nothing")
	}
	for _, from := range []struct {
		name string
		id   uint32
	}{{"host_id", m.GetHostId()}, {"container_id", m.GetContainerId()}} {
		if uint64(from.id)+uint64(m.GetLength()) > math.MaxUint32 {
			return invalid(at+".length", m.GetLength(), "goes beyond the last id from %s %d", from.name, from.id)
		}
	}
	return nil
}

// validateUsernsSharing refuses namespaces of the node beside a user namespace of the pod's own: its root may not mount
// /proc or /dev/mqueue of namespaces that belong to the node. (Kubernetes refuses such pods, too.) The node's network is
// possible: /sys is then the node's, read-only.
func validateUsernsSharing(at string, ns *cri.NamespaceOption) error {
	if ns.GetUsernsOptions() == nil || ns.GetUsernsOptions().GetMode() != cri.NamespaceMode_POD {
		return nil
	}
	if ns.GetPid() == cri.NamespaceMode_NODE {
		return invalid(at+".pid", ns.GetPid(), "is not possible in a user namespace of the pod's own")
	}
	if ns.GetIpc() == cri.NamespaceMode_NODE {
		return invalid(at+".ipc", ns.GetIpc(), "is not possible in a user namespace of the pod's own")
	}
	return nil
}

// sameUserns says whether a container asks for its pod's user namespace.
func sameUserns(a, b *cri.UserNamespace) bool {
	node := func(u *cri.UserNamespace) bool { return u == nil || u.GetMode() == cri.NamespaceMode_NODE }
	if node(a) || node(b) {
		return node(a) && node(b)
	}
	return a.GetMode() == b.GetMode() && sameIDMap(a.GetUids(), b.GetUids()) && sameIDMap(a.GetGids(), b.GetGids())
}

func usernsText(u *cri.UserNamespace) string {
	if u == nil {
		return "none"
	}
	text := u.GetMode().String()
	for _, m := range append(slices.Clone(u.GetUids()), u.GetGids()...) {
		text += fmt.Sprintf(" %d:%d+%d", m.GetContainerId(), m.GetHostId(), m.GetLength())
	}
	return text
}

func sameIDMap(a, b []*cri.IDMapping) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].GetHostId() != b[i].GetHostId() || a[i].GetContainerId() != b[i].GetContainerId() ||
			a[i].GetLength() != b[i].GetLength() {
			return false
		}
	}
	return true
}

// maxMappings is the kernel's UID_GID_MAP_MAX_EXTENTS. More have overflowed a length on their way there (CVE-2021-43784).
const maxMappings = 340

// validateMountMap checks the mapping of a mount. It says, as that of a user namespace does, which id of the host an id in
// the files stands for, and so means something only where the container has a user namespace.
func validateMountMap(at string, m *cri.Mount, userns *cri.UserNamespace) error {
	uids, gids := m.GetUidMappings(), m.GetGidMappings()
	switch {
	case len(uids) == 0 && len(gids) == 0:
		return nil
	case len(uids) == 0:
		return missing(at+".uidMappings", "is empty, but gidMappings is not")
	case len(gids) == 0:
		return missing(at+".gidMappings", "is empty, but uidMappings is not")
	case userns == nil || userns.GetMode() != cri.NamespaceMode_POD:
		return invalid(at+".uidMappings", len(uids), "mappings are given in a pod without a user namespace of its own")
	}
	for _, list := range []struct {
		at   string
		maps []*cri.IDMapping
	}{{at + ".uidMappings", uids}, {at + ".gidMappings", gids}} {
		if len(list.maps) > maxMappings {
			return invalid(list.at, len(list.maps), "mappings are more than %d", maxMappings)
		}
		for i, m := range list.maps {
			if err := validateRange(index(list.at, i), m); err != nil {
				return err
			}
			for j, o := range list.maps[:i] {
				inside, other := IDs{m.GetContainerId(), m.GetLength()}, IDs{o.GetContainerId(), o.GetLength()}
				if inside.Overlap(other) {
					return invalid(index(list.at, i)+".container_id", inside, "overlaps with %v of mapping %d", other, j)
				}
				outside, other := IDs{m.GetHostId(), m.GetLength()}, IDs{o.GetHostId(), o.GetLength()}
				if outside.Overlap(other) {
					return invalid(index(list.at, i)+".host_id", outside, "overlaps with %v of mapping %d", other, j)
				}
			}
		}
	}
	return nil
}

// validateMapped refuses ids that the pod's user namespace does not have: nobody can be them there.
func validateMapped(sandbox *cri.PodSandboxConfig, uidField string, uid int64, gidField string, gid int64, groups []int64) error {
	u, own := Userns(sandbox)
	if !own {
		return nil
	}
	const unmapped = "is not in the pod's user namespace, which has ids 0..%d"
	if uid >= int64(u.UIDs.Length) {
		return invalid(uidField, uid, unmapped, u.UIDs.Length-1)
	}
	if gid >= int64(u.GIDs.Length) {
		return invalid(gidField, gid, unmapped, u.GIDs.Length-1)
	}
	for i, g := range groups {
		if g >= int64(u.GIDs.Length) {
			return invalid(index(securityContext+".supplemental_groups", i), g, unmapped, u.GIDs.Length-1)
		}
	}
	return nil
}

// mapped refuses an identity that the pod's user namespace does not have, wherever it is from.
func (id identity) mapped(in Input) error {
	sc := in.Container.GetLinux().GetSecurityContext()
	uidField, gidField := securityContext+".run_as_user.value", securityContext+".run_as_group.value"
	switch {
	case sc.GetRunAsUsername() != "":
		uidField = securityContext + ".run_as_username"
	case sc.GetRunAsUser() == nil:
		uidField = "image USER"
	}
	if sc.GetRunAsGroup() == nil {
		gidField = strings.TrimSuffix(uidField, ".value") + ": its primary group"
	}
	user := id.containerUser().GetLinux()
	return validateMapped(in.Sandbox, uidField, user.GetUid(), gidField, user.GetGid(), user.GetSupplementalGroups())
}

// idMap gives a mount the mapping that it asks for: where that is the pod's, the runtime takes the user namespace itself. An
// image volume asks in vain, since its layers are mapped already.
func idMap(bound *specs.Mount, m *cri.Mount, userns *cri.UserNamespace) {
	if len(m.GetUidMappings()) == 0 || m.GetImage().GetImage() != "" {
		return
	}
	bound.Options = append(bound.Options, "idmap")
	if sameIDMap(m.GetUidMappings(), userns.GetUids()) && sameIDMap(m.GetGidMappings(), userns.GetGids()) {
		return
	}
	convert := func(list []*cri.IDMapping) (out []specs.LinuxIDMapping) {
		for _, m := range list {
			out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
		}
		return out
	}
	bound.UIDMappings, bound.GIDMappings = convert(m.GetUidMappings()), convert(m.GetGidMappings())
}
