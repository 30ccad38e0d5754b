//go:build integration

package integration

import (
	"context"
	"fmt"
	"math"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// badStoppedTarget joins the PID namespace of a container that has ended.
func badStoppedTarget() badRequest {
	return badRequest{"container: target that has ended", codes.FailedPrecondition, []string{"target_id"}, func(ctx context.Context, b *badInput) error {
		cfg := lab.Sleeper("bad")
		cfg.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: b.stopped}
		_, err := b.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: b.podID, Config: cfg, SandboxConfig: b.pod})
		return err
	}}
}

// byID is a call that names one container or pod.
type byID struct {
	name, field string
	unknown     codes.Code // for an id that nothing has
	stopped     codes.Code // for a container that has exited; OK: not asked
	call        func(context.Context, *lab.Client, string) error
}

func drop[S any](_ S, err error) error { return err }

var callsByID = []byID{
	{"StopPodSandbox", "pod_sandbox_id", codes.OK, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}))
	}},
	{"RemovePodSandbox", "pod_sandbox_id", codes.OK, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}))
	}},
	{"PodSandboxStatus", "pod_sandbox_id", codes.NotFound, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id}))
	}},
	{"PortForward", "pod_sandbox_id", codes.NotFound, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: id, Port: []int32{80}}))
	}},
	{"StartContainer", "container_id", codes.NotFound, codes.FailedPrecondition, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}))
	}},
	{"StopContainer", "container_id", codes.OK, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id}))
	}},
	{"RemoveContainer", "container_id", codes.OK, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}))
	}},
	{"ContainerStatus", "container_id", codes.NotFound, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id}))
	}},
	{"ContainerStats", "container_id", codes.NotFound, codes.OK, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id}))
	}},
	{"ReopenContainerLog", "container_id", codes.NotFound, codes.FailedPrecondition, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: id}))
	}},
	{"UpdateContainerResources", "container_id", codes.NotFound, codes.FailedPrecondition, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 2}}))
	}},
	{"ExecSync", "container_id", codes.NotFound, codes.FailedPrecondition, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}}))
	}},
	{"Exec", "container_id", codes.NotFound, codes.FailedPrecondition, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.RuntimeServiceClient.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true}))
	}},
	{"Attach", "container_id", codes.NotFound, codes.FailedPrecondition, func(ctx context.Context, c *lab.Client, id string) error {
		return drop(c.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: id, Stdout: true}))
	}},
}

// badCalls are requests of all calls but RunPodSandbox and CreateContainer.
func badCalls() []badRequest {
	const wrong = codes.InvalidArgument
	var list []badRequest
	for _, c := range callsByID {
		add := func(name string, code codes.Code, id func(*badInput) string, says ...string) {
			list = append(list, badRequest{c.name + ": " + name, code, says, func(ctx context.Context, b *badInput) error { return c.call(ctx, b.CRI, id(b)) }})
		}
		for name, id := range map[string]string{
			"no id": "", "id with a line break": "a\nb", "id with a NUL byte": "a\x00", "id that is a path": "../../../etc/passwd", "id of 64 KiB": longText,
		} {
			add(name, wrong, func(*badInput) string { return id }, c.field)
		}
		if c.unknown != codes.OK {
			add("unknown id", c.unknown, func(*badInput) string { return strings.Repeat("0", 64) }, strings.Repeat("0", 64))
			other := func(b *badInput) string { return b.podID }
			if c.field == "pod_sandbox_id" {
				other = func(b *badInput) string { return b.id }
			}
			add("id of another kind", c.unknown, other)
		}
		if c.stopped != codes.OK {
			add("container that has exited", c.stopped, func(b *badInput) string { return b.stopped })
		}
	}
	run := func(name string, code codes.Code, req *runtimeapi.RunPodSandboxRequest, says ...string) {
		list = append(list, badCall("RunPodSandbox: "+name, code, func(b *badInput) func(context.Context, *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
			return func(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
				return b.CRI.RunPodSandbox(ctx, r)
			}
		}, func(b *badInput) *runtimeapi.RunPodSandboxRequest {
			if req.RuntimeHandler != "" {
				req.Config = b.Pod("bad")
			}
			return req
		}, says...))
	}
	run("nothing said", wrong, &runtimeapi.RunPodSandboxRequest{}, "config")
	for _, h := range []string{"runc", "../x", "a\nb", longText} {
		run(fmt.Sprintf("handler %.20q", h), wrong, &runtimeapi.RunPodSandboxRequest{RuntimeHandler: h}, "runtime_handler")
	}
	list = append(list, badRequest{"RunPodSandbox: name that is taken", codes.AlreadyExists, []string{"good"}, func(ctx context.Context, b *badInput) error {
		cfg := b.Pod("good")
		cfg.Metadata = b.pod.Metadata
		return drop(b.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}))
	}})

	call := func(name string, code codes.Code, do func(context.Context, *badInput) error, says ...string) {
		list = append(list, badRequest{name, code, says, do})
	}
	for _, grace := range []int64{-1, math.MinInt64} {
		call(fmt.Sprint("StopContainer: grace ", grace), wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: b.id, Timeout: grace}))
		}, "timeout", fmt.Sprint(grace))
		call(fmt.Sprint("ExecSync: timeout ", grace), wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: b.id, Cmd: []string{"true"}, Timeout: grace}))
		}, "timeout", fmt.Sprint(grace))
	}
	for name, cmd := range map[string][]string{
		"no command": nil, "empty program": {""}, "NUL byte": {"sh", "a\x00b"}, "argument of 128 KiB": {"true", string(make128K())},
	} {
		call("ExecSync: "+name, wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: b.id, Cmd: cmd}))
		}, "cmd")
		call("Exec: "+name, wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.RuntimeServiceClient.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: b.id, Cmd: cmd, Stdout: true}))
		}, "cmd")
	}
	call("Exec: no stream", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.RuntimeServiceClient.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: b.id, Cmd: []string{"true"}}))
	}, "stdin, stdout, stderr")
	call("Exec: terminal with stderr", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.RuntimeServiceClient.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: b.id, Cmd: []string{"true"}, Tty: true, Stderr: true}))
	}, "stderr")
	call("Attach: no stream", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: b.id}))
	}, "stdin, stdout, stderr")
	call("Attach: terminal with stderr", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: b.id, Tty: true, Stderr: true}))
	}, "stderr")
	for _, port := range []int32{0, -1, 65536, math.MaxInt32} {
		call(fmt.Sprint("PortForward: port ", port), wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: b.podID, Port: []int32{80, port}}))
		}, "port", fmt.Sprint(port))
	}
	update := func(name string, req *runtimeapi.UpdateContainerResourcesRequest, says ...string) {
		call("UpdateContainerResources: "+name, wrong, func(ctx context.Context, b *badInput) error {
			req.ContainerId = b.id
			return drop(b.CRI.UpdateContainerResources(ctx, req))
		}, says...)
	}
	update("nothing said", &runtimeapi.UpdateContainerResourcesRequest{}, "linux")
	update("windows", &runtimeapi.UpdateContainerResourcesRequest{Windows: &runtimeapi.WindowsContainerResources{}}, "windows")
	update("cpu_period 5", &runtimeapi.UpdateContainerResourcesRequest{Linux: &runtimeapi.LinuxContainerResources{CpuPeriod: 5}}, "linux.cpu_period", "5")
	update("cpuset_cpus x", &runtimeapi.UpdateContainerResourcesRequest{Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "x"}}, "linux.cpuset_cpus", "x")
	update("unified cgroup.kill", &runtimeapi.UpdateContainerResourcesRequest{Linux: &runtimeapi.LinuxContainerResources{Unified: map[string]string{"cgroup.kill": "1"}}}, "linux.unified", "cgroup.kill")

	for _, name := range []string{
		"", "a b", "a\nb", "a\x00b", "Upper Case", "example.com/UPPER/case", "../../etc/passwd", "http://example.com/x", "example.com/x@sha256:zz", "example.com/x@sha256:" + strings.Repeat("0", 63),
		":", "@", "/", "example.com/:tag", "example.com/x:" + strings.Repeat("t", 129), longText, "-x", "example.com//x", "example.com/x:tag:tag",
	} {
		call(fmt.Sprintf("PullImage: %.30q", name), wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: name}}))
		})
	}
	call("PullImage: nothing said", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{}))
	}, "image")
	call("PullImage: for a handler that there is not", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "example.com/x:1", RuntimeHandler: "kata"}}))
	}, "image.runtime_handler", "kata")
	call("PullImage: token with a line break", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{
			Image: &runtimeapi.ImageSpec{Image: "example.com/x:1"}, Auth: &runtimeapi.AuthConfig{RegistryToken: "a\r\nHost: x"},
		}))
	}, "auth.registry_token")
	for _, name := range []string{"", "a b", "a\nb", longText} {
		call(fmt.Sprintf("ImageStatus: %.30q", name), wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}}))
		}, "image.image")
		call(fmt.Sprintf("RemoveImage: %.30q", name), wrong, func(ctx context.Context, b *badInput) error {
			return drop(b.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: name}}))
		}, "image.image")
	}
	call("ListImages: name with a blank", wrong, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.ListImages(ctx, &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: "a b"}}}))
	}, "image.image")
	call("CheckpointContainer", codes.Unimplemented, func(ctx context.Context, b *badInput) error {
		return drop(b.CRI.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: b.id, Location: "/etc/passwd"}))
	})
	call("a message of 16 MiB and more", codes.ResourceExhausted, func(ctx context.Context, b *badInput) error {
		cfg := b.Pod("bad")
		cfg.Annotations = map[string]string{"k": strings.Repeat("v", 16<<20)}
		return drop(b.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}, grpc.MaxCallSendMsgSize(64<<20)))
	}, "larger than max")
	call("a message of just under 16 MiB", wrong, func(ctx context.Context, b *badInput) error {
		cfg := lab.Sleeper("bad")
		cfg.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte(strings.Repeat("v", 16<<20-4096))}}
		return drop(b.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: b.podID, Config: cfg}, grpc.MaxCallSendMsgSize(64<<20)))
	}, "config.envs[0].value")
	return list
}
