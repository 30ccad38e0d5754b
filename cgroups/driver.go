package cgroups

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups/systemd"
)

// Driver is who makes the cgroups of new pods. A [Path] knows which driver made it, so that what an earlier daemon made
// with another one is still measured, killed and removed.
type Driver string

// The drivers. [Cgroupfs] makes directories; [Systemd] has systemd make a scope for each sandbox and each container,
// where systemd owns the tree and would undo what others do in it.
const (
	Cgroupfs Driver = "cgroupfs"
	Systemd  Driver = "systemd"
)

// autoDriver is the option that leaves the choice to [ChooseDriver].
const autoDriver = "auto"

// ChooseDriver turns an option into a driver: "cgroupfs", "systemd" (which must be process 1 then), or "auto", which is
// systemd where that is process 1, as kubeadm expects. The kubelet asks for the outcome and does the same.
func ChooseDriver(option string) (Driver, error) {
	switch booted := systemd.IsRunningSystemd(); {
	case option == string(Cgroupfs), option == autoDriver && !booted:
		return Cgroupfs, nil
	case option == autoDriver, option == string(Systemd) && booted:
		return Systemd, nil
	case option == string(Systemd):
		return "", fmt.Errorf("cgroup driver %q: systemd is not process 1 here: %w", option, errdefs.ErrFailedPrecondition)
	}
	return "", fmt.Errorf("cgroup driver %q is none of %s, %s, %s: %w", option, autoDriver, Cgroupfs, Systemd, errdefs.ErrInvalidArgument)
}

// Join returns the path of the cgroup of a sandbox or container below a parent, where an empty parent means
// [DefaultParent]. For [Systemd] the parent ends in the name of a slice, whatever stands before it, since that name says
// where the slice is: of "/kubepods.slice/kubepods-podX.slice" the last part alone counts. Its errors are of the class
// errdefs.ErrInvalidArgument.
func (d Driver) Join(parent, id string) (Path, error) {
	if d != Systemd {
		return Join(parent, id)
	}
	if parent == "" {
		parent = DefaultParent + sliceSuffix
	}
	dir, err := expandSlice(path.Base(parent))
	if err != nil {
		return "", fmt.Errorf("cgroup parent %q: %w", parent, err)
	}
	if strings.Contains(id, "-") { // cAdvisor and the kubelet cut a scope's name at the last one
		return "", fmt.Errorf("cgroup name %q has a dash: %w", id, errdefs.ErrInvalidArgument)
	}
	if err := validUnit(id); err != nil {
		return "", fmt.Errorf("cgroup name %q: %w", id, err)
	}
	return ParsePath(dir + "/" + ScopePrefix + "-" + id + scopeSuffix)
}

// ScopePrefix begins the names of the scopes that berth has systemd make: "berth-ID.scope".
const ScopePrefix = "berth"

const (
	sliceSuffix = ".slice"
	scopeSuffix = ".scope"
)

// Scope is what systemd knows a cgroup by.
type Scope struct {
	Slice string // kubepods-podX.slice
	ID    string // of the sandbox or container
}

// Unit is the name of the scope's unit.
func (s Scope) Unit() string { return ScopePrefix + "-" + s.ID + scopeSuffix }

// Scope returns the scope of a path that [Driver.Join] made for [Systemd], and false for one of [Cgroupfs].
func (p Path) Scope() (Scope, bool) {
	dir, unit := path.Split(string(p))
	id, isScope := strings.CutPrefix(unit, ScopePrefix+"-")
	id, isUnit := strings.CutSuffix(id, scopeSuffix)
	s := Scope{Slice: path.Base(dir), ID: id}
	if !isScope || !isUnit || validUnit(id) != nil || strings.Contains(id, "-") {
		return Scope{}, false
	}
	// A directory elsewhere that is only called so is not systemd's.
	if at, err := expandSlice(s.Slice); err != nil || at+"/" != dir {
		return Scope{}, false
	}
	return s, true
}

// expandSlice is where a slice is: "a-b.slice" in "/a.slice/a-b.slice".
func expandSlice(name string) (string, error) {
	if !strings.HasSuffix(name, sliceSuffix) {
		return "", fmt.Errorf("%q is not a slice (NAME%s), which the systemd cgroup driver needs: %w", name, sliceSuffix, errdefs.ErrInvalidArgument)
	}
	if name == "-"+sliceSuffix {
		return "", fmt.Errorf("%q is the root slice: %w", name, errdefs.ErrInvalidArgument)
	}
	if err := validUnit(name); err != nil {
		return "", fmt.Errorf("slice %q: %w", name, err)
	}
	dir, err := systemd.ExpandSlice(name)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return dir, nil
}

// validUnit accepts what systemd does in the name of a unit (unit_name_is_valid), but for templates.
func validUnit(name string) error {
	if err := validName(name); err != nil {
		return err
	}
	for i := range len(name) {
		c := name[i]
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', strings.IndexByte(`:-_.\`, c) >= 0:
		default:
			return fmt.Errorf("%q cannot be in the name of a unit of systemd: %w", c, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
