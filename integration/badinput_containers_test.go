//go:build integration

package integration

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

type containerConfig = runtimeapi.ContainerConfig

// badContainers are requests of CreateContainer, but for what confines the container.
func badContainers() []badRequest {
	var list []badRequest
	add := func(name string, change func(*containerConfig), says ...string) {
		list = append(list, badContainer(name, codes.InvalidArgument, change, says...))
	}
	for field, set := range map[string]func(*containerConfig, string){
		"metadata.name": func(c *containerConfig, v string) { c.Metadata.Name = v },
		"image.image":   func(c *containerConfig, v string) { c.Image.Image = v },
		"log_path":      func(c *containerConfig, v string) { c.LogPath = v },
		"working_dir":   func(c *containerConfig, v string) { c.WorkingDir = "/" + v },
		"mounts[0].container_path": func(c *containerConfig, v string) {
			c.Mounts = []*runtimeapi.Mount{bindMount("/tmp", "/"+v)}
		},
		"devices[0].container_path": func(c *containerConfig, v string) {
			c.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/" + v, HostPath: "/dev/null", Permissions: "r"}}
		},
		"devices[0].host_path": func(c *containerConfig, v string) {
			c.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/x", HostPath: "/dev/" + v, Permissions: "r"}}
		},
		"CDI_devices[0].name": func(c *containerConfig, v string) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/class=" + v}}
		},
	} {
		for kind, value := range controls {
			add(field+" with "+kind, func(c *containerConfig) { set(c, value) }, "config."+field)
		}
		if field != "CDI_devices[0].name" { // a device's name has no end of its own: see below
			add(field+" of 64 KiB", func(c *containerConfig) { set(c, longText) }, "config."+field)
		}
	}
	add("no name", func(c *containerConfig) { c.Metadata.Name = "" }, "config.metadata.name")
	add("no metadata", func(c *containerConfig) { c.Metadata = nil }, "config.metadata")
	add("no image", func(c *containerConfig) { c.Image = nil }, "config.image")
	add("image name empty", func(c *containerConfig) { c.Image.Image = "" }, "config.image")
	list = append(list, badContainer("image that is not here", codes.NotFound, func(c *containerConfig) { c.Image.Image = "example.com/no/such:1" }, "config.image", "example.com/no/such:1"))
	add("log_path absolute", func(c *containerConfig) { c.LogPath = "/etc/passwd" }, "config.log_path", "/etc/passwd")
	add("log_path goes up", func(c *containerConfig) { c.LogPath = "../../x.log" }, "config.log_path", "../../x.log")
	add("log_path goes up in the middle", func(c *containerConfig) { c.LogPath = "a/../../x.log" }, "config.log_path")
	add("log_path with a name of 256 bytes", func(c *containerConfig) { c.LogPath = strings.Repeat("n", 256) }, "config.log_path")
	add("working_dir relative", func(c *containerConfig) { c.WorkingDir = "tmp" }, "config.working_dir", "tmp")
	add("working_dir with a name of 256 bytes", func(c *containerConfig) { c.WorkingDir = "/" + strings.Repeat("n", 256) }, "config.working_dir")
	list = append(list, badContainer("working_dir below a program", codes.FailedPrecondition, func(c *containerConfig) { c.WorkingDir = "/bin/busybox/x" }, "config.working_dir", "/bin/busybox/x", "not a directory"))
	add("windows", func(c *containerConfig) { c.Windows = &runtimeapi.WindowsContainerConfig{} }, "config.windows")
	add("stop_signal 66", func(c *containerConfig) { c.StopSignal = 66 }, "config.stop_signal", "66")
	add("stop_signal -1", func(c *containerConfig) { c.StopSignal = -1 }, "config.stop_signal", "-1")
	add("label without a key", func(c *containerConfig) { c.Labels = map[string]string{"": ""} }, "config.labels")
	add("labels of 1 MiB", func(c *containerConfig) { c.Labels = map[string]string{"k": strings.Repeat("v", 1<<20)} }, "config.labels")
	add("annotation without a key", func(c *containerConfig) { c.Annotations = map[string]string{"": ""} }, "config.annotations")
	add("annotations of 2 MiB", func(c *containerConfig) { c.Annotations = map[string]string{"k": strings.Repeat("v", 2<<20)} }, "config.annotations")
	add("annotations of the image of 2 MiB", func(c *containerConfig) {
		c.Image.Annotations = map[string]string{"k": strings.Repeat("v", 2<<20)}
	}, "config.image.annotations")

	add("command with a NUL byte", func(c *containerConfig) { c.Command = []string{"sh", "a\x00b"} }, "config.command[1]")
	add("command of an empty program", func(c *containerConfig) { c.Command = []string{""} }, "config.command")
	add("args with a NUL byte", func(c *containerConfig) { c.Args = []string{"\x00"} }, "config.args[0]")
	add("an argument of 128 KiB", func(c *containerConfig) { c.Args = []string{strings.Repeat("x", 128<<10)} }, "config.args[0]", "131072 bytes")
	add("arguments of 7 MiB together", func(c *containerConfig) {
		for range 70 {
			c.Args = append(c.Args, strings.Repeat("x", 100<<10))
		}
	}, "config.args", "more than")
	add("a million empty arguments", func(c *containerConfig) { c.Args = make([]string, 1_000_000) }, "config.args")
	add("env without a name", func(c *containerConfig) { c.Envs = []*runtimeapi.KeyValue{{Value: []byte("x")}} }, "config.envs[0].key")
	add("env name with =", func(c *containerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "A=B"}} }, "config.envs[0].key", "A=B")
	add("env name with a NUL byte", func(c *containerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "A\x00B"}} }, "config.envs[0].key")
	add("env value with a NUL byte", func(c *containerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("a\x00")}} }, "config.envs[0].value")
	add("HOME with a line break", func(c *containerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "HOME", Value: []byte("/\nx:x")}} }, "config.envs[0].value")
	add("env value of 128 KiB", func(c *containerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: make128K()}}
	}, "config.envs[0].value", "131071 bytes")
	add("environment of 7 MiB", func(c *containerConfig) {
		for i := range 70 {
			c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: fmt.Sprint("V", i), Value: []byte(strings.Repeat("x", 100<<10))})
		}
	}, "config.envs", "more than")

	list = append(list, badMounts()...)

	device := func(name string, d *runtimeapi.Device, says ...string) {
		add("device "+name, func(c *containerConfig) {
			c.Devices = []*runtimeapi.Device{d}
		}, append(says, "config.devices[0]")...)
	}
	device("relative here", &runtimeapi.Device{ContainerPath: "dev/x", HostPath: "/dev/null", Permissions: "r"}, "container_path")
	device("relative there", &runtimeapi.Device{ContainerPath: "/dev/x", HostPath: "dev/null", Permissions: "r"}, "host_path")
	device("in place of the root", &runtimeapi.Device{ContainerPath: "/", HostPath: "/dev/null", Permissions: "r"}, "container_path")
	device("in place of the root, in a roundabout way", &runtimeapi.Device{ContainerPath: "/a/..", HostPath: "/dev/null", Permissions: "r"}, "container_path")
	device("all of the host", &runtimeapi.Device{ContainerPath: "/dev/x", HostPath: "/", Permissions: "r"}, "host_path")
	device("that is not there", &runtimeapi.Device{ContainerPath: "/dev/x", HostPath: "/dev/no-such", Permissions: "r"}, "host_path", "/dev/no-such")
	device("that is a file", &runtimeapi.Device{ContainerPath: "/dev/x", HostPath: "/etc/passwd", Permissions: "r"}, "host_path", "/etc/passwd")
	for _, p := range []string{"", "x", "rwx", "RW", "r w", "0666", "rwm\n", "a"} {
		device(fmt.Sprintf("of permissions %q", p), &runtimeapi.Device{ContainerPath: "/dev/x", HostPath: "/dev/null", Permissions: p}, "permissions")
	}
	list = append(list,
		badContainer("device that is a directory without any", codes.FailedPrecondition, func(c *containerConfig) {
			c.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/x", HostPath: "/etc/ssl", Permissions: "r"}}
		}, "config.devices[0].host_path"),
		badContainer("CDI device that nobody defines", codes.FailedPrecondition, func(c *containerConfig) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/class=none"}}
		}, "config.CDI_devices", "vendor.com/class=none"),
		badContainer("CDI device with a name of 64 KiB", codes.FailedPrecondition, func(c *containerConfig) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/class=" + longText}}
		}, "config.CDI_devices"),
	)
	for _, name := range []string{"", "gpu", "vendor.com/gpu", "vendor.com/gpu=", "../gpu=0", "/etc/passwd"} {
		add(fmt.Sprintf("CDI device %q", name), func(c *containerConfig) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: name}} }, "config.CDI_devices[0].name")
	}
	add("5,000 CDI devices", func(c *containerConfig) {
		for range 5000 {
			c.CDIDevices = append(c.CDIDevices, &runtimeapi.CDIDevice{Name: "vendor.com/class=none"})
		}
	}, "config.CDI_devices", "5000")

	create := func(name string, code codes.Code, change func(*badInput, *runtimeapi.CreateContainerRequest), says ...string) {
		list = append(list, badRequest{"create: " + name, code, says, func(ctx context.Context, b *badInput) error {
			req := &runtimeapi.CreateContainerRequest{PodSandboxId: b.podID, Config: lab.Sleeper("bad"), SandboxConfig: b.pod}
			change(b, req)
			_, err := b.CRI.CreateContainer(ctx, req)
			return err
		}})
	}
	create("nothing said", codes.InvalidArgument, func(_ *badInput, r *runtimeapi.CreateContainerRequest) { r.Config = nil }, "config")
	create("no pod named", codes.InvalidArgument, func(_ *badInput, r *runtimeapi.CreateContainerRequest) { r.PodSandboxId = "" }, "pod_sandbox_id")
	create("unknown pod", codes.NotFound, func(_ *badInput, r *runtimeapi.CreateContainerRequest) { r.PodSandboxId = strings.Repeat("0", 64) }, "pod sandbox")
	create("pod that is a container", codes.NotFound, func(b *badInput, r *runtimeapi.CreateContainerRequest) { r.PodSandboxId = b.id }, "pod sandbox")
	create("pod that is a path", codes.InvalidArgument, func(_ *badInput, r *runtimeapi.CreateContainerRequest) { r.PodSandboxId = "../../etc" }, "pod_sandbox_id", "../../etc")
	create("name that is taken", codes.AlreadyExists, func(_ *badInput, r *runtimeapi.CreateContainerRequest) { r.Config.Metadata.Name = "good" }, "good")
	return list
}

func make128K() []byte { return []byte(strings.Repeat("x", 128<<10)) }

// badMounts are mounts of CreateContainer.
func badMounts() []badRequest {
	var list []badRequest
	add := func(name string, code codes.Code, change func(*runtimeapi.Mount), says ...string) {
		list = append(list, badContainer("mount "+name, code, func(c *containerConfig) {
			m := bindMount("/tmp", "/mnt")
			change(m)
			c.Mounts = []*runtimeapi.Mount{bindMount("/tmp", "/other"), m}
		}, append(says, "config.mounts[1]")...))
	}
	const wrong = codes.InvalidArgument
	add("point empty", wrong, func(m *runtimeapi.Mount) { m.ContainerPath = "" }, "container_path")
	add("point relative", wrong, func(m *runtimeapi.Mount) { m.ContainerPath = "mnt" }, "container_path", "mnt")
	for _, p := range []string{"/", "//", "/.", "/a/..", "/..", "/../.."} {
		add(fmt.Sprintf("over the root: %q", p), wrong, func(m *runtimeapi.Mount) { m.ContainerPath = p }, "container_path")
	}
	for _, p := range []string{"/proc", "/proc/self/attr", "/proc/sys", "/a/../proc/1", "/proc/sys/kernel/core_pattern"} {
		add(fmt.Sprintf("over %q", p), wrong, func(m *runtimeapi.Mount) { m.ContainerPath = p }, "container_path")
	}
	add("point with a name of 256 bytes", wrong, func(m *runtimeapi.Mount) { m.ContainerPath = "/" + strings.Repeat("n", 256) }, "container_path")
	add("source empty", wrong, func(m *runtimeapi.Mount) { m.HostPath = "" }, "host_path")
	add("source relative", wrong, func(m *runtimeapi.Mount) { m.HostPath = "tmp" }, "host_path", "tmp")
	add("source with a NUL byte", wrong, func(m *runtimeapi.Mount) { m.HostPath = "/tmp\x00/x" }, "host_path")
	add("source of 64 KiB", wrong, func(m *runtimeapi.Mount) { m.HostPath = "/" + longText }, "host_path")
	add("propagation 3", wrong, func(m *runtimeapi.Mount) { m.Propagation = 3 }, "propagation", "3")
	add("propagation -1", wrong, func(m *runtimeapi.Mount) { m.Propagation = -1 }, "propagation", "-1")
	add("rro, writable", wrong, func(m *runtimeapi.Mount) { m.RecursiveReadOnly = true }, "recursive_read_only")
	for _, p := range []runtimeapi.MountPropagation{1, 2} {
		add(fmt.Sprintf("rro with propagation %v", p), wrong, func(m *runtimeapi.Mount) {
			m.RecursiveReadOnly, m.Readonly, m.Propagation = true, true, p
		}, "recursive_read_only")
	}
	for _, o := range []string{"", "rw", "ro", "bind", "rbind", "suid", "dev", "exec", "rshared", "remount", "size=1", "noexec,suid", "NOEXEC", "noexec\x00", "idmap", "tmpcopyup"} {
		add(fmt.Sprintf("option %q", o), wrong, func(m *runtimeapi.Mount) { m.MountOptions = []string{"noexec", o} }, "mount_options[1]")
	}
	image := func(m *runtimeapi.Mount) {
		m.HostPath, m.Readonly, m.Image = "", true, &runtimeapi.ImageSpec{Image: lab.Sh("", "").Image.Image}
	}
	add("of an image and a path", wrong, func(m *runtimeapi.Mount) { image(m); m.HostPath = "/tmp" }, "host_path")
	add("of an image, writable", wrong, func(m *runtimeapi.Mount) { image(m); m.Readonly = false }, "readonly")
	add("of an image, shared", wrong, func(m *runtimeapi.Mount) { image(m); m.Propagation = 1 }, "propagation")
	add("of no image, but a part of it", wrong, func(m *runtimeapi.Mount) { m.ImageSubPath = "bin" }, "image_sub_path")
	for _, p := range []string{"..", "../x", "/bin", "bin/../../x", "a\x00b", "a\nb"} {
		add(fmt.Sprintf("of an image's %q", p), wrong, func(m *runtimeapi.Mount) { image(m); m.ImageSubPath = p }, "image_sub_path")
	}
	add("of an image's missing part", wrong, func(m *runtimeapi.Mount) { image(m); m.ImageSubPath = "no/such" }, "image_sub_path", "no/such")
	add("of an image's file", wrong, func(m *runtimeapi.Mount) { image(m); m.ImageSubPath = "etc/passwd" }, "image_sub_path", "etc/passwd")
	add("of an image that is not here", codes.NotFound, func(m *runtimeapi.Mount) { image(m); m.Image.Image = "example.com/no/such:1" }, "image", "example.com/no/such:1")
	list = append(list, badContainer("5,000 mounts", wrong, func(c *containerConfig) {
		for i := range 5000 {
			c.Mounts = append(c.Mounts, bindMount("/tmp", fmt.Sprint("/m", i)))
		}
	}, "config.mounts", "5000"))
	return list
}
