//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// usernsPod is a pod with a user namespace of its own, for one test.
func (s *security) usernsPod(t *testing.T, change func(*runtimeapi.PodSandboxConfig)) (*securityPod, *usernsPod) {
	t.Helper()
	cfg := s.podConfig(plainPod)
	r := ids()
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = r.options()
	if change != nil {
		change(cfg)
	}
	p := s.ownPod(t, cfg)
	return p, &usernsPod{usernsRange: r, id: p.id, cfg: cfg}
}

// The first case of CVE-2025-47291 was a pod with a user namespace: its processes were in the root cgroup, without limits.
func (s *security) TestCVE_2025_47291_UserNamespacesHaveTheirCgroup(t *testing.T) {
	const limit = 64 << 20
	for _, mode := range []runtimeapi.NamespaceMode{runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_POD} {
		p, u := s.usernsPod(t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.NamespaceOptions.Pid = mode })
		ctr := u.container("limited")
		ctr.Linux.SecurityContext.NamespaceOptions.Pid = mode
		ctr.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: limit}
		id := s.start(t, p, ctr)
		info := s.info(t, id)
		for _, pid := range []int{info.PID, s.execPID(t, id)} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
			must(t, err)
			for line := range strings.Lines(string(text)) {
				_, rest, _ := strings.Cut(line, ":")
				controllers, path, _ := strings.Cut(strings.TrimSpace(rest), ":")
				if (controllers == "memory" || controllers == "pids" || controllers == "devices") && !strings.Contains(path, id) {
					t.Errorf("pid mode %v: process %d is in %s", mode, pid, line)
				}
			}
		}
		if out, code := s.exec(t, id, "dd if=/dev/zero of=/dev/null bs=200M count=1"); code == 0 {
			t.Errorf("pid mode %v: 200 MiB of memory under a limit of 64: %s", mode, out)
		}
	}
}

// What an image brings that is the node's root's or a device elsewhere is neither in a user namespace.
func (s *security) TestImagesOfUserNamespacesBringNoPower(t *testing.T) {
	image := s.image(t, nil,
		imagestest.File("bin/suid", "#!/bin/sh\n").Mode(0o4755), imagestest.Block("disk", 8, 0).Mode(0o666))
	p, u := s.usernsPod(t, nil)
	ctr := u.container("power")
	ctr.Image.Image = image
	id := s.start(t, p, ctr)
	out, _ := s.exec(t, id, "cat /disk; echo x > /disk")
	if !strings.Contains(out, "denied") && !strings.Contains(out, "not permitted") || strings.Contains(out, "x\n") {
		t.Errorf("a device of the image: %s", out)
	}
	s.exec(t, id, "busybox cp /bin/busybox /bin/mine; chmod 6755 /bin/mine; chmod 6755 /bin/suid")
	for name, want := range map[string]uint32{"bin/mine": u.host, "bin/suid": u.host} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(s.Root(), "images", "rootfs", id, "upper", name), &st))
		if st.Mode&unix.S_ISUID == 0 || st.Uid != want || st.Gid != want {
			t.Errorf("%s on the host: mode %o of %d:%d", name, st.Mode, st.Uid, st.Gid)
		}
	}
}

// On its way to its root file system init passes the run directory: its pod's root may, others of the host may not, and
// nothing is there for it but that.
func (s *security) TestUserNamespacesReachNothingOfTheRunDirectory(t *testing.T) {
	p, u := s.usernsPod(t, nil)
	id := s.start(t, p, u.container("passes"))
	bundle := filepath.Join(s.Run(), "containers", id)
	for uid, paths := range map[uint32][]string{
		1000:   {bundle + "/rootfs/bin", bundle + "/config.json"},
		u.host: {filepath.Join(s.Run(), "pods", p.id, "ns"), filepath.Join(s.Run(), "state", id), filepath.Join(s.Root(), "images")},
	} {
		for _, path := range paths {
			if err := asUser(int(uid), func() error { _, err := os.Stat(path); return err }); err == nil {
				t.Errorf("uid %d reaches %s", uid, path)
			}
		}
	}
	for _, path := range []string{s.Run(), filepath.Join(s.Run(), "containers"), bundle, bundle + "/config.json", filepath.Join(s.Run(), "lock")} {
		if err := asUser(int(u.host), func() error {
			f, err := os.Open(path)
			if err == nil {
				_ = f.Close()
			}
			return err
		}); err == nil {
			t.Errorf("the pod's root reads %s", path)
		}
	}
}
