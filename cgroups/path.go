package cgroups

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// DefaultParent is where pods go whose request names no parent.
const DefaultParent = "/berth"

// Bounds of the kernel: a name is NAME_MAX long at most, and PATH_MAX must leave room for the mount point and a file.
const (
	maxName = 255
	maxPath = 3072
)

// Path is the place of a cgroup below the root of every hierarchy, such as "/kubepods/burstable/podX/ID". It is made by
// [Join] or [ParsePath]: absolute, clean, and never the root itself.
type Path string

// Join returns the path of the cgroup id below parent, where an empty parent means [DefaultParent].
// Its errors are of the class errdefs.ErrInvalidArgument.
func Join(parent, id string) (Path, error) {
	if parent == "" {
		parent = DefaultParent
	}
	if !path.IsAbs(parent) {
		// Relative paths would depend on the cgroup of whoever resolves them.
		return "", fmt.Errorf("cgroup parent %q is not absolute: %w", parent, errdefs.ErrInvalidArgument)
	}
	if err := validName(id); err != nil {
		return "", fmt.Errorf("cgroup name %q: %w", id, err)
	}
	return ParsePath(strings.TrimRight(parent, "/") + "/" + id)
}

// ParsePath checks a path that was written down, such as one of a record.
// Its errors are of the class errdefs.ErrInvalidArgument.
func ParsePath(s string) (Path, error) {
	names, ok := strings.CutPrefix(s, "/")
	if !ok {
		return "", fmt.Errorf("cgroup path %q is not absolute: %w", s, errdefs.ErrInvalidArgument)
	}
	if names == "" {
		// A container there would have no limits at all (CVE-2025-47291).
		return "", fmt.Errorf("cgroup path %q is the root cgroup: %w", s, errdefs.ErrInvalidArgument)
	}
	if len(s) > maxPath {
		return "", fmt.Errorf("cgroup path is %d bytes long, more than %d: %w", len(s), maxPath, errdefs.ErrInvalidArgument)
	}
	for name := range strings.SplitSeq(names, "/") {
		if err := validName(name); err != nil {
			return "", fmt.Errorf("cgroup path %q: %w", s, err)
		}
	}
	return Path(s), nil
}

func validName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("empty name: %w", errdefs.ErrInvalidArgument)
	case name == ".", name == "..":
		return fmt.Errorf("name %q leads elsewhere: %w", name, errdefs.ErrInvalidArgument)
	case len(name) > maxName:
		return fmt.Errorf("name is %d bytes long, more than %d: %w", len(name), maxName, errdefs.ErrInvalidArgument)
	case strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r < ' ' || r == 0x7f }):
		return fmt.Errorf("name %q has a slash or control character: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// check guards the calls against paths that did not come from Join or ParsePath.
func (p Path) check() error {
	_, err := ParsePath(string(p))
	return err
}
