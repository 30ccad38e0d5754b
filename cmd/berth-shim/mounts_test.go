package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/internal/thread"
)

// What a request brings is where the creation looks for it, in this mount namespace alone, and is called what it is called on
// the node.
func TestAttachedMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	base := t.TempDir()
	pod, bundle, volume := base+"/pod", base+"/bundle", base+"/volume"
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write(volume+"/dir/x", "in a directory")
	write(volume+"/file", "a file")
	for _, dir := range []string{pod, bundle} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	spec := &specs.Spec{Mounts: []specs.Mount{
		{Source: "proc"}, {Source: volume + "/dir"}, {Source: pod + "/hosts"}, {Source: volume + "/file"},
	}}
	req := shim.CreateRequest{Bundle: bundle, Trees: []string{pod}, Sources: []int{1, 3}}
	var trees []*os.File
	err := thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			return err
		}
		// The pod's directory as it is on the node: with a mount on it.
		if err := unix.Mount("pod", pod, "tmpfs", 0, ""); err != nil {
			return err
		}
		write(pod+"/hosts", "localhost")
		for _, path := range []string{pod, volume + "/dir", volume + "/file"} {
			fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
			if err != nil {
				return err
			}
			tree := os.NewFile(uintptr(fd), path)
			defer tree.Close()
			trees = append(trees, tree)
		}
		if err := unix.Unmount(pod, 0); err != nil {
			return err
		}
		asNamed, err := attach(req, spec, trees)
		if err != nil {
			return err
		}
		for path, want := range map[string]string{
			spec.Mounts[1].Source + "/x": "in a directory", spec.Mounts[2].Source: "localhost", spec.Mounts[3].Source: "a file",
		} {
			if got, err := os.ReadFile(path); err != nil || string(got) != want {
				t.Errorf("%s: %q, %v", path, got, err)
			}
		}
		if spec.Mounts[1].Source == volume+"/dir" || spec.Mounts[2].Source != pod+"/hosts" {
			t.Errorf("sources are %+v", spec.Mounts)
		}
		if got := asNamed(errors.New("mount " + spec.Mounts[3].Source + ": no")).Error(); got != "mount "+volume+"/file: no" {
			t.Errorf("an error says %q", got)
		}
		if asNamed(nil) != nil {
			t.Error("no error is one")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(pod + "/hosts"); err == nil {
		t.Error("a mount is seen by others")
	}

	for _, wrong := range []shim.CreateRequest{{Sources: []int{4}}, {Sources: []int{-1}}} {
		wrong.Bundle = t.TempDir()
		if _, err := attach(wrong, spec, trees); err == nil {
			t.Errorf("%+v was taken", wrong)
		}
	}
}
