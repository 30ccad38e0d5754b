package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
)

// attach puts the mounts that a request brings where the creation looks for them, in this helper's own mount namespace:
// trees where they are on the node, sources of the specification's mounts below the bundle, since where they are on the node
// may be seen through other mounts only. asNamed gives an error the sources' own names again.
func attach(req shim.CreateRequest, spec *specs.Spec, mounts []*os.File) (asNamed func(error) error, err error) {
	for i, dir := range req.Trees {
		if err := moveMount(mounts[i], dir); err != nil {
			return nil, err
		}
		// What is mounted below it here is not the node's.
		if err := unix.Mount("", dir, "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			return nil, fmt.Errorf("make %s private: %w", dir, err)
		}
	}
	var names []string
	dir := filepath.Join(req.Bundle, "mounts")
	if len(req.Sources) > 0 {
		if err := os.Mkdir(dir, 0o711); err != nil { // init may be a user without rights on the host
			return nil, err
		}
	}
	for k, i := range req.Sources {
		if i < 0 || i >= len(spec.Mounts) {
			return nil, fmt.Errorf("there is no mount %d", i)
		}
		m, tree := &spec.Mounts[i], mounts[len(req.Trees)+k]
		at := filepath.Join(dir, fmt.Sprintf("%03d", i)) // none begins with another
		if err := placeFor(tree, at); err != nil {
			return nil, err
		}
		if err := moveMount(tree, at); err != nil {
			return nil, err
		}
		names = append(names, at, m.Source)
		m.Source = at
	}
	replace := strings.NewReplacer(names...)
	return func(err error) error {
		if err == nil {
			return nil
		}
		return errors.New(replace.Replace(err.Error()))
	}, nil
}

// placeFor makes what a mount can be on.
func placeFor(tree *os.File, at string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return os.Mkdir(at, 0o700)
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func moveMount(tree *os.File, at string) error {
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: at, Err: err}
	}
	return nil
}
