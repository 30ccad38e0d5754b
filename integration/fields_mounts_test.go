//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
)

// mountpoint mounts a tmpfs on a directory of the host, with a propagation of its own. It goes with the test.
func mountpoint(t *testing.T, dir string, propagation uintptr) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	must(t, unix.Mount("fields", dir, "tmpfs", 0, "mode=755"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	must(t, unix.Mount("", dir, "", propagation, ""))
}

// sameMounts wants the status to have exactly the mounts of the request.
func (f *fields) sameMounts(t *testing.T, id string, want []*runtimeapi.Mount) {
	t.Helper()
	got := f.status(t, id).Mounts
	if len(got) != len(want) {
		t.Fatalf("status has %d mounts, want %d: %v", len(got), len(want), got)
	}
	for i := range want {
		is := proto.CloneOf(got[i])
		if is.Image != nil {
			is.Image.ImageRef = want[i].Image.GetImageRef() // added by the runtime; a case of its own
		}
		if f.peer {
			continue
		}
		if !proto.Equal(is, want[i]) {
			t.Errorf("status has %v, want %v", is, want[i])
		}
	}
}

// mountFields are about volumes of the host.
func mountFields() []fieldGroup {
	const about = "ContainerConfig.mounts Mount.container_path Mount.host_path"
	option := func(name, script, want string) fieldCase {
		return fieldCase{name, "Mount.mount_options", func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd 2.4 does not know mount_options")
			}
			dir := f.volume(t)
			must(t, os.WriteFile(dir+"/script", []byte("#!/bin/sh\necho ran\n"), 0o755))
			must(t, os.Symlink("script", dir+"/link"))
			must(t, unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
			m := bindMount(dir, "/mnt")
			m.MountOptions = []string{name}
			id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(m)))
			out, _ := f.exec(t, id, script+"; grep -c '^[0-9 ]* [0-9:]* [^ ]* /mnt [^ ]*"+name+"' /proc/self/mountinfo")
			if out != want+"1\n" && out != "1\n"+want { // what it says on standard error comes last
				t.Errorf("it says %q, want %q and 1", out, want)
			}
			f.sameMounts(t, id, []*runtimeapi.Mount{m})
		}}
	}
	return []fieldGroup{
		{"mounts", []fieldCase{
			{"a directory", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				must(t, os.WriteFile(dir+"/in", []byte("from the host\n"), 0o644))
				f.says(t, f.pod(t, plainPod), f.ctr("cat /data/in; echo from inside > /data/out", withMount(bindMount(dir, "/data"))), "from the host\n")
				if out, err := os.ReadFile(dir + "/out"); err != nil || string(out) != "from inside\n" {
					t.Errorf("the host sees %q, %v", out, err)
				}
			}},
			{"a file", about, func(t *testing.T, f *fields) {
				file := f.volume(t) + "/file"
				must(t, os.WriteFile(file, []byte("one file\n"), 0o644))
				f.says(t, f.pod(t, plainPod), f.ctr("cat /etc/new/file", withMount(bindMount(file, "/etc/new/file"))), "one file\n")
			}},
			{"a path that does not exist becomes a directory", about, func(t *testing.T, f *fields) {
				dir := filepath.Join(f.volume(t), "not", "there")
				f.says(t, f.pod(t, plainPod), f.ctr("ls /data | wc -l", withMount(bindMount(dir, "/data"))), "0\n")
				if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
					t.Error(err)
				}
			}},
			{"a link of the host", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				must(t, os.Mkdir(dir+"/real", 0o755))
				must(t, os.WriteFile(dir+"/real/x", []byte("behind the link\n"), 0o644))
				must(t, os.Symlink("real", dir+"/link"))
				m := bindMount(dir+"/link", "/data")
				id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(m)))
				if out, _ := f.exec(t, id, "cat /data/x"); out != "behind the link\n" {
					t.Errorf("it says %q", out)
				}
				if got := f.status(t, id).Mounts; len(got) != 1 || got[0].HostPath != dir+"/link" {
					t.Errorf("status has %v", got)
				}
			}},
			{"a mount point that the image does not have", about, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("test -d /a/b/c && echo there", withMount(bindMount(f.volume(t), "/a/b/c"))), "there\n")
			}},
			{"a mount point behind a link of the image", about, func(t *testing.T, f *fields) {
				cfg := f.ctr("ls /target /link", withMount(bindMount(f.volume(t), "/link/x")))
				cfg.Image.Image = f.image(t, nil, imagestest.Dir("target"), imagestest.Symlink("link", "/target"))
				f.says(t, f.pod(t, plainPod), cfg, "/link:\nx\n\n/target:\nx\n")
			}},
			{"one below the other, in any order", about, func(t *testing.T, f *fields) {
				outer, inner := f.volume(t), f.volume(t)
				must(t, os.WriteFile(outer+"/o", nil, 0o644))
				must(t, os.WriteFile(inner+"/i", nil, 0o644))
				must(t, os.Mkdir(outer+"/sub", 0o755))
				f.says(t, f.pod(t, plainPod), f.ctr("ls /d /d/sub", withMount(bindMount(inner, "/d/sub"), bindMount(outer, "/d"))), "/d:\no\nsub\n\n/d/sub:\ni\n")
			}},
			{"in the place of the pod's own files", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				for _, name := range []string{"hosts", "resolv.conf", "hostname"} {
					must(t, os.WriteFile(dir+"/"+name, []byte("my "+name+"\n"), 0o644))
				}
				f.says(t, f.pod(t, plainPod), f.ctr("cd /etc; cat hosts resolv.conf hostname", withMount(
					bindMount(dir+"/hosts", "/etc/hosts"), bindMount(dir+"/resolv.conf", "/etc/../etc/resolv.conf"), bindMount(dir+"/hostname", "/etc/hostname"))),
					"my hosts\nmy resolv.conf\nmy hostname\n")
			}},
			{"in the place of /dev/shm", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				must(t, os.WriteFile(dir+"/mine", nil, 0o644))
				f.says(t, f.pod(t, plainPod), f.ctr("ls /dev/shm", withMount(bindMount(dir, "/dev/shm"))), "mine\n")
			}},
			{"submounts come along", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				mountpoint(t, dir+"/sub", unix.MS_PRIVATE)
				must(t, os.WriteFile(dir+"/sub/x", []byte("below\n"), 0o644))
				f.says(t, f.pod(t, plainPod), f.ctr("cat /data/sub/x", withMount(bindMount(dir, "/data"))), "below\n")
			}},
			{"status has what was asked for and nothing else", "ContainerConfig.mounts Mount.selinux_relabel", func(t *testing.T, f *fields) {
				list := []*runtimeapi.Mount{bindMount(f.volume(t), "/a"), bindMount(f.volume(t), "/etc/hosts.d"), bindMount(f.volume(t), "/b/../c")}
				list[0].Readonly = true
				list[1].SelinuxRelabel = true
				id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(list...)))
				f.sameMounts(t, id, list)
				f.sameMounts(t, f.start(t, f.pod(t, plainPod), f.idle("")), nil)
			}},
			{"the termination message", about, func(t *testing.T, f *fields) {
				file := f.volume(t) + "/message"
				must(t, os.WriteFile(file, nil, 0o644))
				must(t, os.Chmod(file, 0o666))
				m := bindMount(file, "/dev/termination-log")
				cfg := f.ctr("echo this is why > /dev/termination-log", withMount(m), withSecurity(func(s *containerSecurity) { s.RunAsUser = number(1000) }))
				f.says(t, f.pod(t, plainPod), cfg, "")
				if text, err := os.ReadFile(file); err != nil || string(text) != "this is why\n" {
					t.Errorf("%q, %v", text, err)
				}
			}},
		}},
		{"read-only", []fieldCase{
			{"a volume", "Mount.readonly", func(t *testing.T, f *fields) {
				dir := f.volume(t)
				m := bindMount(dir, "/data")
				m.Readonly = true
				id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(m)))
				if out, code := f.exec(t, id, "touch /data/x"); code == 0 || !strings.Contains(out, "Read-only file system") {
					t.Errorf("exit code %d: %q", code, out)
				}
			}},
			{"not what is mounted below", "Mount.readonly", func(t *testing.T, f *fields) {
				dir := f.volume(t)
				mountpoint(t, dir+"/sub", unix.MS_PRIVATE)
				m := bindMount(dir, "/data")
				m.Readonly = true
				f.says(t, f.pod(t, plainPod), f.ctr("touch /data/x 2>/dev/null || echo no; touch /data/sub/x && echo yes", withMount(m)), "no\nyes\n")
			}},
			{"all that is mounted below", "Mount.recursive_read_only", func(t *testing.T, f *fields) {
				dir := f.volume(t)
				mountpoint(t, dir+"/sub", unix.MS_PRIVATE)
				mountpoint(t, dir+"/sub/deeper", unix.MS_PRIVATE)
				m := bindMount(dir, "/data")
				m.Readonly, m.RecursiveReadOnly = true, true
				id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(m)))
				out, _ := f.exec(t, id, "touch /data/x || touch /data/sub/x || touch /data/sub/deeper/x || echo nowhere")
				if !strings.HasPrefix(out, "nowhere\n") || strings.Count(out, "Read-only file system") != 3 {
					t.Errorf("it says %q", out)
				}
				f.sameMounts(t, id, []*runtimeapi.Mount{m})
			}},
			{"recursively, but writable", "Mount.recursive_read_only", func(t *testing.T, f *fields) {
				m := bindMount(f.volume(t), "/data")
				m.RecursiveReadOnly = true
				f.refused(t, f.pod(t, plainPod), f.ctr("true", withMount(m)), codes.InvalidArgument, "recursive_read_only")
			}},
			{"recursively, but open to later mounts", "Mount.recursive_read_only Mount.propagation", func(t *testing.T, f *fields) {
				dir := f.volume(t)
				mountpoint(t, dir, unix.MS_SHARED)
				for _, p := range []runtimeapi.MountPropagation{runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL} {
					m := bindMount(dir, "/data")
					m.Readonly, m.RecursiveReadOnly, m.Propagation = true, true, p
					f.refused(t, f.pod(t, privilegedPod), f.ctr("true", withMount(m)), codes.InvalidArgument, "recursive_read_only")
				}
			}},
			{"the handler says that it can", "Mount.recursive_read_only", func(t *testing.T, f *fields) {
				resp, err := f.CRI.RuntimeServiceClient.Status(t.Context(), &runtimeapi.StatusRequest{})
				must(t, err)
				for _, h := range resp.RuntimeHandlers {
					if h.Name == "" && h.Features.GetRecursiveReadOnlyMounts() {
						return
					}
				}
				t.Errorf("handlers %v", resp.RuntimeHandlers)
			}},
			{"the root file system", "LinuxContainerSecurityContext.readonly_rootfs", func(t *testing.T, f *fields) {
				cfg := f.ctr("touch /x 2>&1 || touch /etc/x 2>/dev/null || echo no; echo x > /data/x && echo but volumes; touch /dev/shm/x && echo and memory",
					withMount(bindMount(f.volume(t), "/data")), withSecurity(func(s *containerSecurity) { s.ReadonlyRootfs = true }))
				f.says(t, f.pod(t, plainPod), cfg, "touch: /x: Read-only file system\nno\nbut volumes\nand memory\n")
			}},
			{"the pod's files with it", "LinuxContainerSecurityContext.readonly_rootfs", func(t *testing.T, f *fields) {
				script := "for i in hosts hostname resolv.conf; do sh -c \"echo >> /etc/$i\" 2>/dev/null && echo $i; done; true"
				f.says(t, f.pod(t, plainPod), f.ctr(script), "hosts\nhostname\nresolv.conf\n")
				f.says(t, f.pod(t, plainPod), f.ctr(script, withSecurity(func(s *containerSecurity) { s.ReadonlyRootfs = true })), "")
			}},
			{"the root is writable otherwise", "LinuxContainerSecurityContext.readonly_rootfs", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("touch /x /etc/x && echo yes"), "yes\n")
			}},
		}},
		{"mount options", []fieldCase{
			option("noexec", "/mnt/script 2>&1 | grep -o 'Permission denied'", "Permission denied\n"),
			option("nosuid", "/mnt/script", "ran\n"),
			option("nodev", "echo x > /mnt/null || true", "sh: can't create /mnt/null: Permission denied\n"),
			option("nosymfollow", "cat /mnt/link > /dev/null || true", "cat: can't open '/mnt/link': Too many levels of symbolic links\n"),
			option("noatime", "/mnt/script", "ran\n"),
			option("nodiratime", "/mnt/script", "ran\n"),
			option("relatime", "/mnt/script", "ran\n"),
			{"several, read-only", "Mount.mount_options", func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd 2.4 does not know mount_options")
				}
				m := bindMount(f.volume(t), "/mnt")
				m.Readonly, m.MountOptions = true, []string{"noexec", "nodev", "nosuid"}
				out := f.gives(t, f.pod(t, plainPod), f.ctr("grep ' /mnt ' /proc/self/mountinfo | cut -d ' ' -f 6", withMount(m)))
				for _, o := range append(m.MountOptions, "ro") {
					if !strings.Contains(","+strings.TrimSpace(out)+",", ","+o+",") {
						t.Errorf("%s is not in %q", o, out)
					}
				}
			}},
			{"the runtime says that it can", "Mount.mount_options", func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd 2.4 does not know mount_options")
				}
				resp, err := f.CRI.RuntimeServiceClient.Status(t.Context(), &runtimeapi.StatusRequest{})
				must(t, err)
				if !resp.Features.GetMountOptions() {
					t.Errorf("features %v", resp.Features)
				}
			}},
			{"what gives more is refused", "Mount.mount_options", func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd 2.4 does not know mount_options")
				}
				for _, o := range []string{"rw", "suid", "exec", "dev", "rshared", "bind"} {
					m := bindMount(f.volume(t), "/mnt")
					m.MountOptions = []string{o}
					f.refused(t, f.pod(t, plainPod), f.ctr("true", withMount(m)), codes.InvalidArgument, "mount_options[0]", o)
				}
			}},
		}},
	}
}

// propagationFields are about mounts that are made later, on either side.
func propagationFields() []fieldGroup {
	const about = "Mount.propagation"
	modes := map[string]runtimeapi.MountPropagation{
		"private":           runtimeapi.MountPropagation_PROPAGATION_PRIVATE,
		"host to container": runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
		"bidirectional":     runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL,
	}
	volume := func(t *testing.T, f *fields, mode string, propagation uintptr) *runtimeapi.Mount {
		dir := f.volume(t)
		mountpoint(t, dir, propagation)
		for _, sub := range []string{"host", "inside"} {
			must(t, os.Mkdir(filepath.Join(dir, sub), 0o755))
		}
		m := bindMount(dir, "/data")
		m.Propagation = modes[mode]
		return m
	}
	shows := func(mode string, toContainer, toHost bool) fieldCase {
		return fieldCase{mode, about, func(t *testing.T, f *fields) {
			m := volume(t, f, mode, unix.MS_SHARED)
			id := f.start(t, f.pod(t, privilegedPod), f.idleWith(withMount(m), withSecurity(func(s *containerSecurity) { s.Privileged = true })))
			mountpoint(t, m.HostPath+"/host", unix.MS_SHARED)
			must(t, os.WriteFile(m.HostPath+"/host/x", nil, 0o644))
			if out, _ := f.exec(t, id, "ls /data/host"); (out == "x\n") != toContainer {
				t.Errorf("the container sees %q of a mount of the host", out)
			}
			if out, code := f.exec(t, id, "mount -t tmpfs inside /data/inside && touch /data/inside/y"); code != 0 {
				t.Fatalf("exit code %d: %s", code, out)
			}
			t.Cleanup(func() { _ = unix.Unmount(m.HostPath+"/inside", unix.MNT_DETACH) })
			if _, err := os.Stat(m.HostPath + "/inside/y"); (err == nil) != toHost {
				t.Errorf("the host sees of a mount of the container: %v", err)
			}
			f.sameMounts(t, id, []*runtimeapi.Mount{m})
		}}
	}
	refused := func(mode string, propagation uintptr, kind string) fieldCase {
		return fieldCase{mode + " of a volume that is " + kind, about, func(t *testing.T, f *fields) {
			m := volume(t, f, mode, propagation)
			f.refused(t, f.pod(t, privilegedPod), f.ctr("true", withMount(m)), codes.FailedPrecondition, "propagation")
		}}
	}
	return []fieldGroup{{"propagation", []fieldCase{
		shows("private", false, false),
		shows("host to container", true, false),
		shows("bidirectional", true, true),
		refused("host to container", unix.MS_PRIVATE, "private"),
		refused("bidirectional", unix.MS_PRIVATE, "private"),
		{"a container without privileges cannot mount at all", about, func(t *testing.T, f *fields) {
			m := volume(t, f, "bidirectional", unix.MS_SHARED)
			id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(m)))
			if out, code := f.exec(t, id, "mount -t tmpfs x /data/inside"); code == 0 || !strings.Contains(out, "denied") {
				t.Errorf("exit code %d: %q", code, out)
			}
		}},
	}}}
}

// imageVolumeFields are about images that are mounted.
func imageVolumeFields() []fieldGroup {
	const about = "Mount.image Mount.image_sub_path"
	volume := func(t *testing.T, f *fields) string {
		return f.image(t, nil,
			imagestest.File("data/a", "file a\n"), imagestest.File("data/sub/b", "file b\n"), imagestest.Symlink("inside", "data/sub"), imagestest.Symlink("data/absolute", "/data/sub"),
			imagestest.Symlink("escape", "../../../../../../../../etc"), imagestest.Symlink("loop", "loop"), imagestest.Symlink("proc", "/proc/self/root"),
			imagestest.File("data/run", "#!/bin/sh\necho it runs\n").Mode(0o755))
	}
	of := func(image, sub string) *runtimeapi.Mount {
		return &runtimeapi.Mount{ContainerPath: "/vol", Readonly: true, Image: &runtimeapi.ImageSpec{Image: image}, ImageSubPath: sub}
	}
	shows := func(name, sub, script, want string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr(script, withMount(of(volume(t, f), sub))), want)
		}}
	}
	refused := func(name, sub string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.refused(t, f.pod(t, plainPod), f.ctr("ls -l /vol", withMount(of(volume(t, f), sub))), codes.InvalidArgument, "image_sub_path", sub)
		}}
	}
	return []fieldGroup{{"image volumes", []fieldCase{
		shows("all of an image", "", "cat /vol/data/a; ls -d /vol/bin/sh", "file a\n/vol/bin/sh\n"),
		shows("a part of it", "data/sub", "ls /vol; cat /vol/b", "b\nfile b\n"),
		shows("programs run", "data", "/vol/run", "it runs\n"),
		shows("it is read-only", "data", "touch /vol/x 2>&1; rm /vol/a 2>&1; true", "touch: /vol/x: Read-only file system\nrm: can't remove '/vol/a': Read-only file system\n"),
		refused("a part that is missing", "no/such"),
		refused("a loop", "loop"),
		{"a part behind a link", about, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd does not follow links")
			}
			for _, sub := range []string{"inside", "data/absolute"} {
				f.says(t, f.pod(t, plainPod), f.ctr("ls /vol", withMount(of(volume(t, f), sub))), "b\n")
			}
		}},
		{"a link that leads out ends at the image's root", about, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd does not follow links")
			}
			f.says(t, f.pod(t, plainPod), f.ctr("cat /vol/passwd | head -n 1", withMount(of(volume(t, f), "escape"))), "root:x:0:0::/root:/bin/sh\n")
		}},
		{"a file", about, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd mounts it")
			}
			f.refused(t, f.pod(t, plainPod), f.ctr("true", withMount(of(volume(t, f), "data/a"))), codes.InvalidArgument, "image_sub_path", "data/a")
		}},
		{"writable", about, func(t *testing.T, f *fields) {
			m := of(volume(t, f), "")
			m.Readonly = false
			f.refused(t, f.pod(t, plainPod), f.ctr("true", withMount(m)), codes.InvalidArgument, "readonly")
		}},
		{"out of the image", about, func(t *testing.T, f *fields) {
			f.refused(t, f.pod(t, plainPod), f.ctr("true", withMount(of(volume(t, f), "../../etc"))), codes.InvalidArgument, "image_sub_path", "../../etc")
		}},
		{"an image that is not here", about, func(t *testing.T, f *fields) {
			f.refused(t, f.pod(t, plainPod), f.ctr("true", withMount(of("example.com/no/such:1", ""))), codes.NotFound, "example.com/no/such:1")
		}},
		{"twice in one container, and after the first is gone", about, func(t *testing.T, f *fields) {
			image := volume(t, f)
			second := of(image, "data")
			second.ContainerPath = "/other"
			for range 2 {
				f.says(t, f.pod(t, plainPod), f.ctr("ls /vol; ls /other/sub", withMount(of(image, "data/sub"), second)), "b\nb\n")
			}
		}},
		{"status tells which image it is", about + " ImageSpec.image_ref", func(t *testing.T, f *fields) {
			image := volume(t, f)
			m := of(image, "data")
			id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(m)))
			f.sameMounts(t, id, []*runtimeapi.Mount{m})
			st, err := f.CRI.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
			must(t, err)
			if got := f.status(t, id).Mounts[0].Image.GetImageRef(); got != st.Image.Id && !f.peer {
				t.Errorf("image_ref %q, want %q", got, st.Image.Id)
			}
		}},
		{"in use, it is not taken away", about, func(t *testing.T, f *fields) {
			image := volume(t, f)
			id := f.start(t, f.pod(t, plainPod), f.idleWith(withMount(of(image, "data"))))
			f.removeImage(t, image)
			if out, code := f.exec(t, id, "cat /vol/a"); code != 0 || out != "file a\n" {
				t.Errorf("exit code %d: %q", code, out)
			}
		}},
		{"an artifact, which is no container image", about, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd does not pull it")
			}
			weights := imagestest.LayerBlob{
				Blob: []byte("weights\n"), MediaType: "application/vnd.example.data",
				Descriptor: func(d *ocispec.Descriptor) {
					d.Annotations = map[string]string{ocispec.AnnotationTitle: "sub/weights.bin"}
				},
			}
			img := imagestest.NewImage(weights)
			img.Manifest = func(m *ocispec.Manifest) {
				m.ArtifactType, m.Config = "application/vnd.example.model", ocispec.DescriptorEmptyJSON
			}
			ref := f.pull(t, img)
			f.says(t, f.pod(t, plainPod), f.ctr("cat /vol/sub/weights.bin; touch /vol/x 2>&1; true", withMount(of(ref, ""))),
				"weights\ntouch: /vol/x: Read-only file system\n")
			f.says(t, f.pod(t, plainPod), f.ctr("cat /vol/weights.bin", withMount(of(ref, "sub"))), "weights\n")
			cfg := f.ctr("true")
			cfg.Image.Image = ref
			f.refused(t, f.pod(t, plainPod), cfg, codes.FailedPrecondition, "application/vnd.example.model", "image volume")
		}},
		{"nothing stays mounted", about, func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, nil)
			id := f.start(t, p, f.idleWith(withMount(of(volume(t, f), "data"))))
			f.remove(t, id)
			must(t, lab.Eventually(t.Context(), waitLong, "the volume is unmounted", func(context.Context) error {
				text, err := os.ReadFile("/proc/self/mountinfo")
				if err != nil {
					return err
				}
				if strings.Contains(string(text), id) {
					return fmt.Errorf("mounts of %s are there", id)
				}
				return nil
			}))
		}},
	}}}
}
