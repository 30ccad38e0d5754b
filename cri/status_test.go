package cri

import (
	"encoding/json"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

const imageID = "sha256:0000000000000000000000000000000000000000000000000000000000000001"

func noImage(string) (*images.Image, error) { return nil, errdefs.ErrNotFound }

func tagged(tags ...string) func(string) (*images.Image, error) {
	return func(string) (*images.Image, error) {
		return &images.Image{ID: digest.Digest(imageID), RepoTags: tags}, nil
	}
}

func TestSandboxStatusHasWhatTheKubeletComparesWith(t *testing.T) {
	created := time.Unix(1700000000, 42)
	sb := &pods.Sandbox{
		ID: idA, Ready: true, CreatedAt: created, Handler: "h",
		IPs: []netip.Addr{netip.MustParseAddr("10.1.0.7"), netip.MustParseAddr("fd00::7")},
		Config: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u", Attempt: 3},
			Labels:   map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"},
			Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER},
			}},
		},
	}
	st := sandboxStatus(sb)
	if st.GetState() != cri.PodSandboxState_SANDBOX_READY || st.GetCreatedAt() != created.UnixNano() || st.GetRuntimeHandler() != "h" {
		t.Errorf("%v", st)
	}
	if st.GetNetwork().GetIp() != "10.1.0.7" || len(st.GetNetwork().GetAdditionalIps()) != 1 || st.GetNetwork().GetAdditionalIps()[0].GetIp() != "fd00::7" {
		t.Errorf("network %v", st.GetNetwork())
	}
	if !proto.Equal(st.GetLinux().GetNamespaces().GetOptions(), sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()) {
		t.Errorf("namespace options %v", st.GetLinux())
	}
	if st.GetMetadata().GetAttempt() != 3 || st.GetLabels()["a"] != "b" || st.GetAnnotations()["c"] != "d" {
		t.Errorf("%v", st)
	}
}

func TestSandboxStatusWithoutLinuxOrNetwork(t *testing.T) {
	st := sandboxStatus(&pods.Sandbox{ID: idA, Config: &cri.PodSandboxConfig{}})
	if st.GetLinux().GetNamespaces().GetOptions() == nil || st.GetNetwork() == nil || st.GetNetwork().GetIp() != "" {
		t.Errorf("%v", st)
	}
	if st.GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("state %s", st.GetState())
	}
}

func TestContainerStatusByState(t *testing.T) {
	base := pods.Container{
		ID: idA, SandboxID: idB, ImageID: imageID, CreatedAt: time.Unix(10, 0), LogPath: "/var/log/x.log", StopSignal: "SIGTERM",
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "app", Attempt: 2}, Image: &cri.ImageSpec{Image: "busybox"},
		},
		User:      &cri.ContainerUser{Linux: &cri.LinuxContainerUser{Uid: 7}},
		Resources: &cri.LinuxContainerResources{CpuShares: 512},
	}
	t.Run("created", func(t *testing.T) {
		c := base
		c.State = cri.ContainerState_CONTAINER_CREATED
		st := containerStatus(&c, noImage)
		if st.GetStartedAt() != 0 || st.GetFinishedAt() != 0 || st.GetReason() != "" || st.GetCreatedAt() != 10e9 {
			t.Errorf("%v", st)
		}
		// The client refuses a status without these.
		if st.GetImage().GetImage() != "busybox" || st.GetImageRef() != imageID || st.GetImageId() != imageID || st.GetMetadata().GetName() != "app" {
			t.Errorf("%v", st)
		}
		if st.GetUser().GetLinux().GetUid() != 7 || st.GetResources().GetLinux().GetCpuShares() != 512 || st.GetStopSignal() != cri.Signal_SIGNAL_SIGTERM {
			t.Errorf("%v", st)
		}
	})
	t.Run("exited", func(t *testing.T) {
		for _, tc := range []struct {
			code         int32
			reason, want string
		}{{0, "", "Completed"}, {1, "", "Error"}, {137, "OOMKilled", "OOMKilled"}, {0, "OOMKilled", "OOMKilled"}, {128, "StartError", "StartError"}} {
			c := base
			c.State, c.ExitCode, c.Reason = cri.ContainerState_CONTAINER_EXITED, tc.code, tc.reason
			c.StartedAt, c.FinishedAt = time.Unix(11, 0), time.Unix(12, 0)
			st := containerStatus(&c, noImage)
			if st.GetReason() != tc.want || st.GetExitCode() != tc.code || st.GetStartedAt() != 11e9 || st.GetFinishedAt() != 12e9 {
				t.Errorf("%d %q: %v", tc.code, tc.reason, st)
			}
		}
	})
	t.Run("image by its tag", func(t *testing.T) {
		c := base
		c.ImageRef = "reg/busybox@sha256:2"
		st := containerStatus(&c, tagged("reg/busybox:1", "reg/busybox:2"))
		if st.GetImage().GetImage() != "reg/busybox:1" || st.GetImageRef() != "reg/busybox@sha256:2" {
			t.Errorf("%v", st)
		}
		if st = containerStatus(&c, tagged()); st.GetImage().GetImage() != "busybox" {
			t.Errorf("without tags: %v", st)
		}
	})
	t.Run("no resources are none", func(t *testing.T) {
		c := base
		c.Resources = nil
		if st := containerStatus(&c, noImage); st.GetResources() != nil {
			t.Errorf("%v", st.GetResources())
		}
	})
}

// critest counts them, and the kubelet finds the termination log there.
func TestStatusMountsAreThoseOfTheRequest(t *testing.T) {
	asked := []*cri.Mount{
		{ContainerPath: "/b", HostPath: "/link", Readonly: true, Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
		{ContainerPath: "/v", Image: &cri.ImageSpec{Image: "data:1"}, ImageSubPath: "sub", Readonly: true},
	}
	before := []*cri.Mount{proto.CloneOf(asked[0]), proto.CloneOf(asked[1])}
	got := statusMounts(asked, tagged())
	if len(got) != 2 || !proto.Equal(got[0], asked[0]) {
		t.Fatalf("%v", got)
	}
	if got[1].GetImage().GetImageRef() != imageID || got[1].GetImageSubPath() != "sub" || got[1].GetImage().GetImage() != "data:1" {
		t.Errorf("image volume %v", got[1])
	}
	if !slices.EqualFunc(asked, before, func(a, b *cri.Mount) bool { return proto.Equal(a, b) }) {
		t.Error("the recorded configuration was changed")
	}
	if got := statusMounts(asked, noImage); !proto.Equal(got[1], asked[1]) {
		t.Errorf("image is gone: %v", got[1])
	}
}

func TestStopSignalNames(t *testing.T) {
	for name, want := range map[string]cri.Signal{
		"SIGTERM": cri.Signal_SIGNAL_SIGTERM, "SIGQUIT": cri.Signal_SIGNAL_SIGQUIT, "SIGRTMIN": cri.Signal_SIGNAL_SIGRTMIN,
		"SIGRTMIN+3": cri.Signal_SIGNAL_SIGRTMINPLUS3, "SIGRTMAX-2": cri.Signal_SIGNAL_SIGRTMAXMINUS2,
		"": cri.Signal_SIGNAL_RUNTIME_DEFAULT, "TERM": cri.Signal_SIGNAL_RUNTIME_DEFAULT,
	} {
		if got := stopSignal(name); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}
}

// `crictl inspect -o json` unfolds info.info into info; scripts read these names.
func TestVerboseInfoHasTheNamesOfContainerd(t *testing.T) {
	got, err := info(newContainerInfo(
		&pods.Container{SandboxID: idB, PID: 42, Config: &cri.ContainerConfig{WorkingDir: "/w"}}, json.RawMessage(`{"ociVersion":"1.2.0"}`)))
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		SandboxID   string
		PID         int `json:"pid"`
		Config      *cri.ContainerConfig
		RuntimeSpec struct{ OCIVersion string }
	}
	if err := json.Unmarshal([]byte(got["info"]), &c); err != nil {
		t.Fatal(err)
	}
	if c.SandboxID != idB || c.PID != 42 || c.Config.GetWorkingDir() != "/w" || c.RuntimeSpec.OCIVersion != "1.2.0" {
		t.Errorf("%s", got["info"])
	}
	if got, err = info(newContainerInfo(&pods.Container{}, nil)); err != nil || !json.Valid([]byte(got["info"])) {
		t.Errorf("without a specification: %v %v", got, err)
	}
	got, err = info(newSandboxInfo(&pods.Sandbox{ShimPID: 7, Config: &cri.PodSandboxConfig{}}))
	var sb map[string]any
	if err != nil || json.Unmarshal([]byte(got["info"]), &sb) != nil || sb["pid"] != 7.0 {
		t.Errorf("%v %v", got, err)
	}
}
