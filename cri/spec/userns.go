package spec

import (
	"math"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// validateUserns refuses what no runtime accepts, then what berth does not have yet. Nil and mode NODE are the node's
// user namespace.
func validateUserns(at string, u *cri.UserNamespace) error {
	if u == nil {
		return nil
	}
	switch u.GetMode() {
	case cri.NamespaceMode_NODE:
		if len(u.GetUids()) > 0 || len(u.GetGids()) > 0 {
			return invalid(at+".uids", nil, "mappings are given with mode NODE")
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
	case m.GetLength() == 0:
		return invalid(index(at, 0)+".length", m.GetLength(), "maps nothing")
	case uint64(m.GetHostId())+uint64(m.GetLength()) > math.MaxUint32:
		return invalid(index(at, 0)+".length", m.GetLength(), "goes beyond the last id from host_id %d", m.GetHostId())
	}
	return nil
}

// noUserns refuses a valid request for a user namespace, which berth does not have yet.
func noUserns(at string, u *cri.UserNamespace) error {
	if u != nil && u.GetMode() == cri.NamespaceMode_POD {
		return unsupported(at+".mode", u.GetMode(), "user namespaces are not implemented yet")
	}
	return nil
}

// sameUserns says whether a container asks for its pod's user namespace.
func sameUserns(a, b *cri.UserNamespace) bool {
	node := func(u *cri.UserNamespace) bool { return u == nil || u.GetMode() == cri.NamespaceMode_NODE }
	if node(a) || node(b) {
		return node(a) && node(b)
	}
	same := func(a, b []*cri.IDMapping) bool {
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
	return a.GetMode() == b.GetMode() && same(a.GetUids(), b.GetUids()) && same(a.GetGids(), b.GetGids())
}
