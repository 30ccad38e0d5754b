//go:build integration

package integration

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/testimages"
)

// imageFields are about the image of a container.
func imageFields() []fieldGroup {
	byName := func(name string, ref func(*runtimeapi.Image) string) fieldCase {
		return fieldCase{name, "ContainerConfig.image ImageSpec.image", func(t *testing.T, f *fields) {
			_, err := f.CRI.Pull(t.Context(), testimages.Busybox)
			must(t, err)
			resp, err := f.CRI.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: testimages.Busybox}})
			must(t, err)
			cfg := f.idle(ref(resp.Image))
			id := f.start(t, f.pod(t, plainPod), cfg)
			st := f.status(t, id)
			if st.ImageId != resp.Image.Id || st.ImageRef == "" || st.GetImage().GetImage() == "" {
				t.Errorf("image_id %q, image_ref %q, image %v, want %q", st.ImageId, st.ImageRef, st.Image, resp.Image.Id)
			}
		}}
	}
	return []fieldGroup{{"image", []fieldCase{
		{"every answer names it alike, also when its tag has moved", "ImageSpec.image", func(t *testing.T, f *fields) {
			ref := f.image(t, nil, imagestest.File("is", "old"))
			of := func(name string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: name} }
			status := func(name string) *runtimeapi.Image {
				t.Helper()
				resp, err := f.CRI.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: of(name)})
				must(t, err)
				return resp.GetImage()
			}
			was := status(ref)
			repo, _, _ := strings.Cut(strings.TrimPrefix(ref, f.reg.Host()+"/"), ":")
			if len(was.GetRepoTags()) != 1 || was.RepoTags[0] != ref || len(was.RepoDigests) != 1 || !strings.HasPrefix(was.RepoDigests[0], f.reg.Host()+"/"+repo+"@sha256:") {
				t.Fatalf("status: %v", was)
			}
			p, cfg := f.pod(t, plainPod), f.idle(ref)
			id := f.start(t, p, cfg)
			told := func(image string) {
				t.Helper()
				list, err := f.CRI.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
				must(t, err)
				st, c := f.status(t, id), list.Containers[0]
				if st.GetImage().GetImage() != image || st.ImageRef != was.RepoDigests[0] || st.ImageId != was.Id && !f.peer {
					t.Errorf("status: image %v, image_ref %q, image_id %q; want %q of %v", st.Image, st.ImageRef, st.ImageId, image, was)
				}
				if c.ImageRef != st.ImageRef && !f.peer || c.GetImageId() != st.ImageId {
					t.Errorf("list: image_ref %q, image_id %q; the status has %q and %q", c.ImageRef, c.ImageId, st.ImageRef, st.ImageId)
				}
			}
			told(ref)

			moved := imagestest.NewImage(f.busybox, imagestest.Layer(imagestest.File("is", "new")))
			f.reg.Push(repo, "1", moved)
			newID, err := f.CRI.Pull(t.Context(), ref)
			must(t, err)
			t.Cleanup(func() { f.removeImage(t, was.Id) })
			told(ref) // what it was asked for by, since the image has no tag
			for _, name := range []string{was.Id, strings.TrimPrefix(was.Id, "sha256:")[:13], was.RepoDigests[0]} {
				if old := status(name); old.GetId() != was.Id || len(old.RepoTags) != 0 || len(old.RepoDigests) != 1 {
					t.Errorf("%s, untagged: %v", name, old)
				}
			}
			for name, want := range map[string]string{ref: newID, was.Id: was.Id} {
				list, err := f.CRI.ListImages(t.Context(), &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: of(name)}})
				must(t, err)
				if len(list.Images) != 1 || !proto.Equal(list.Images[0], status(name)) || list.Images[0].Id != want {
					t.Errorf("list of %s: %v; status: %v, want %s", name, list.Images, status(name), want)
				}
			}
		}},
		byName("by tag", func(*runtimeapi.Image) string { return testimages.Busybox }),
		byName("by id", func(i *runtimeapi.Image) string { return i.Id }),
		byName("by id without sha256:", func(i *runtimeapi.Image) string { return strings.TrimPrefix(i.Id, "sha256:") }),
		byName("by digest", func(i *runtimeapi.Image) string { return i.RepoDigests[0] }),
		{"that is not here", "ImageSpec.image", func(t *testing.T, f *fields) {
			p := f.pod(t, plainPod)
			cfg := f.ctr("true")
			cfg.Image.Image = "example.com/no/such:1"
			_, err := f.CRI.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
			if f.peer {
				if err == nil {
					t.Error("it is created")
				}
				return
			}
			wantCode(t, err, codes.NotFound, "example.com/no/such:1")
		}},
		{"what else is said of it configures nothing", "ImageSpec.annotations ImageSpec.user_specified_image", func(t *testing.T, f *fields) {
			cfg := f.ctr("echo runs")
			cfg.Image.Annotations = map[string]string{"org.systemd.property.TasksMax": "1", "a": "b"}
			cfg.Image.UserSpecifiedImage = "busybox"
			f.says(t, f.pod(t, plainPod), cfg, "runs\n")
		}},
		{"for a handler that there is not", "ImageSpec.runtime_handler", func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd takes its default")
			}
			f.refused(t, f.pod(t, plainPod), f.ctr("true", func(c *runtimeapi.ContainerConfig) { c.Image.RuntimeHandler = "kata" }),
				codes.InvalidArgument, "config.image.runtime_handler", "kata")
		}},
	}}}
}

// resourceFields show that the status echoes what was asked, and that limits are where the kernel has them; what they do
// is for tests of their own.
func resourceFields() []fieldGroup {
	const about = "LinuxContainerConfig.resources LinuxContainerResources.cpu_period LinuxContainerResources.cpu_quota LinuxContainerResources.cpu_shares " +
		"LinuxContainerResources.memory_limit_in_bytes LinuxContainerResources.cpuset_cpus LinuxContainerResources.cpuset_mems"
	return []fieldGroup{{"resources", []fieldCase{
		{"are told as given", about, func(t *testing.T, f *fields) {
			asked := &runtimeapi.LinuxContainerResources{
				CpuPeriod: 50_000, CpuQuota: 25_000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 500, CpusetCpus: "0", CpusetMems: "0",
			}
			id := f.start(t, f.pod(t, plainPod), f.idleWith(func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = asked }))
			got := proto.CloneOf(f.status(t, id).GetResources().GetLinux())
			if f.peer { // it adds what it has made of it
				got.MemorySwapLimitInBytes, got.OomScoreAdj = 0, asked.OomScoreAdj
			}
			if !proto.Equal(got, asked) {
				t.Errorf("status has %v, want %v", got, asked)
			}
		}},
		{"huge pages of which there are none", "LinuxContainerResources.hugepage_limits HugepageLimit.page_size", func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr("echo runs", func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}}
			}), "runs\n")
		}},
		{"huge pages", "HugepageLimit.limit", func(t *testing.T, f *fields) {
			limits := []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}, {PageSize: "1GB"}}
			id := f.start(t, f.pod(t, plainPod), f.idleWith(func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.HugepageLimits = limits }))
			if !f.peer && hasController("hugetlb") {
				f.wantLimit(t, id, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max", "4194304", "4194304")
			}
			if got := f.status(t, id).GetResources().GetLinux().GetHugepageLimits(); !f.peer && (len(got) != 2 || !proto.Equal(got[0], limits[0])) {
				t.Errorf("status has %v, want %v", got, limits)
			}
		}},
		{"swap as much as memory is none", "LinuxContainerResources.memory_swap_limit_in_bytes", func(t *testing.T, f *fields) {
			const memory = 64 << 20
			id := f.start(t, f.pod(t, plainPod), f.idleWith(func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.MemoryLimitInBytes, c.Linux.Resources.MemorySwapLimitInBytes = memory, memory
			}))
			if !f.peer {
				f.wantLimit(t, id, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max", fmt.Sprint(memory), "0")
			}
		}},
		{"some swap beside memory", "LinuxContainerResources.memory_swap_limit_in_bytes", func(t *testing.T, f *fields) {
			id := f.start(t, f.pod(t, plainPod), f.idleWith(func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.MemoryLimitInBytes, c.Linux.Resources.MemorySwapLimitInBytes = 64<<20, 80<<20
			}))
			if !f.peer {
				f.wantLimit(t, id, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max", fmt.Sprint(80<<20), fmt.Sprint(16<<20))
			}
		}},
		{"unified names a file of cgroup v2", "LinuxContainerResources.unified", func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd leaves it out on v1")
			}
			cfg := f.ctr("echo runs", func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.Unified = map[string]string{"memory.oom.group": "1"}
			})
			if _, v2 := cgroupsOf(t, 1)[""]; v2 && len(cgroupsOf(t, 1)) == 1 {
				f.says(t, f.pod(t, plainPod), cfg, "runs\n")
				return
			}
			f.refused(t, f.pod(t, plainPod), cfg, codes.FailedPrecondition, "config.linux.resources.unified")
		}},
		{"the pod's own, which the kubelet has set already", "LinuxPodSandboxConfig.overhead LinuxPodSandboxConfig.resources", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) {
				c.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20, CpuShares: 10}
				c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuShares: 100, CpuQuota: 100_000, CpuPeriod: 100_000}
			})
			f.says(t, p, f.ctr("echo "+fmt.Sprint(1)), "1\n")
		}},
	}}}
}

// wantLimit wants a file of a container's cgroup to say that, where the kernel has the file.
func (f *fields) wantLimit(t *testing.T, id, controller, v1, v2, on1, on2 string) {
	t.Helper()
	cgroup, _, err := cgroupOf(t.Context(), f.Node, id)
	must(t, err)
	want := on1
	if onCgroup2() {
		want = on2
	}
	if got := limitOf(t, cgroup, controller, v1, v2); got != want && got != "" {
		t.Errorf("%s has %q, want %q", cgroupFile(cgroup, controller, v1, v2), got, want)
	}
}
