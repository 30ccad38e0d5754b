package cri

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

func sandboxState(sb *pods.Sandbox) cri.PodSandboxState {
	if sb.Ready {
		return cri.PodSandboxState_SANDBOX_READY
	}
	return cri.PodSandboxState_SANDBOX_NOTREADY
}

// sandboxStatus is what the kubelet decides by whether a sandbox can stay: it makes a new one where the network mode
// differs from the pod's, or where a pod that is not on the host network has no address.
func sandboxStatus(sb *pods.Sandbox) *cri.PodSandboxStatus {
	st := &cri.PodSandboxStatus{
		Id:             sb.ID,
		Metadata:       sb.Config.GetMetadata(),
		State:          sandboxState(sb),
		CreatedAt:      nanos(sb.CreatedAt),
		Network:        &cri.PodSandboxNetworkStatus{},
		Linux:          &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: namespaceOptions(sb)}},
		Labels:         sb.Config.GetLabels(),
		Annotations:    sb.Config.GetAnnotations(),
		RuntimeHandler: sb.Handler,
	}
	for i, ip := range sb.IPs {
		if i == 0 {
			st.Network.Ip = ip.String()
			continue
		}
		st.Network.AdditionalIps = append(st.Network.AdditionalIps, &cri.PodIP{Ip: ip.String()})
	}
	return st
}

// namespaceOptions echoes the options of the request. Where it had none, the zero value says what holds: all of the pod.
func namespaceOptions(sb *pods.Sandbox) *cri.NamespaceOption {
	if o := sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(); o != nil {
		return o
	}
	return &cri.NamespaceOption{}
}

// containerStatus is the status of a container; find looks an image up.
func containerStatus(c *pods.Container, find func(string) (*images.Image, error)) *cri.ContainerStatus {
	st := &cri.ContainerStatus{
		Id:          c.ID,
		Metadata:    c.Config.GetMetadata(),
		State:       c.State,
		CreatedAt:   nanos(c.CreatedAt),
		StartedAt:   nanos(c.StartedAt),
		FinishedAt:  nanos(c.FinishedAt),
		ExitCode:    c.ExitCode,
		Image:       statusImage(c, find),
		ImageRef:    imageRef(c),
		ImageId:     c.ImageID,
		Reason:      reason(c),
		Message:     c.Message,
		Labels:      c.Config.GetLabels(),
		Annotations: c.Config.GetAnnotations(),
		Mounts:      statusMounts(c.Config.GetMounts(), find),
		LogPath:     c.LogPath,
		User:        c.User,
		StopSignal:  stopSignal(c.StopSignal),
	}
	if c.Resources != nil {
		st.Resources = &cri.ContainerResources{Linux: c.Resources}
	}
	return st
}

// statusImage is the image by a tag if it has one, as docker did: that is what the kubelet shows as a container's image.
// It is by what the container was created from otherwise, also when the image is gone.
func statusImage(c *pods.Container, find func(string) (*images.Image, error)) *cri.ImageSpec {
	if img, err := find(c.ImageID); err == nil && len(img.RepoTags) > 0 {
		return &cri.ImageSpec{Image: img.RepoTags[0]}
	}
	if spec := c.Config.GetImage(); spec.GetImage() != "" {
		return spec
	}
	return &cri.ImageSpec{Image: c.ImageID}
}

// imageRef is never empty: the kubelet's client refuses a status without one.
func imageRef(c *pods.Container) string {
	if c.ImageRef != "" {
		return c.ImageRef
	}
	return c.ImageID
}

// reason falls back on the words that the kubelet and its users know.
func reason(c *pods.Container) string {
	if c.Reason != "" || c.State != cri.ContainerState_CONTAINER_EXITED {
		return c.Reason
	}
	if c.ExitCode == 0 {
		return "Completed"
	}
	return "Error"
}

// statusMounts is exactly the mounts of the request, in which an image volume also says which image it is (KEP-4639).
func statusMounts(mounts []*cri.Mount, find func(string) (*images.Image, error)) []*cri.Mount {
	out := make([]*cri.Mount, len(mounts))
	for i, m := range mounts {
		out[i] = m
		if m.GetImage().GetImage() == "" {
			continue
		}
		if img, err := find(m.GetImage().GetImage()); err == nil {
			clone := proto.CloneOf(m) // the configuration is shared with everybody who asks
			clone.Image.ImageRef = img.ID.String()
			out[i] = clone
		}
	}
	return out
}

// stopSignal is CRI's name of a signal such as "SIGTERM" or "SIGRTMIN+3".
func stopSignal(name string) cri.Signal {
	n := strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(name)
	if v, ok := cri.Signal_value["SIGNAL_"+n]; ok {
		return cri.Signal(v)
	}
	return cri.Signal_SIGNAL_RUNTIME_DEFAULT
}

// nanos is CRI's form of an instant: 0 where there was none.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// sandboxInfo is what a verbose status of a sandbox adds. Field names are containerd's, which scripts know
// (`crictl inspectp ID | jq .info.pid`).
type sandboxInfo struct {
	PID            int    `json:"pid"`
	ProcessStatus  string `json:"processStatus"`
	Reason         string `json:"reason,omitempty"`
	NetNS          string `json:"netns,omitempty"`
	RuntimeHandler string `json:"runtimeHandler"`
	// Waiting is what could not be released yet, and is tried again.
	Waiting *pods.Waiting `json:"waiting,omitempty"`
	// Overhead and Resources are the pod's as the last resize left them; the CRI has no field for them.
	Overhead  *cri.LinuxContainerResources `json:"overhead,omitempty"`
	Resources *cri.LinuxContainerResources `json:"resources,omitempty"`
	Config    *cri.PodSandboxConfig        `json:"config"`
}

func newSandboxInfo(sb *pods.Sandbox) *sandboxInfo {
	i := &sandboxInfo{
		PID: sb.ShimPID, ProcessStatus: "running", Reason: sb.Reason, NetNS: sb.NetNS, RuntimeHandler: sb.Handler,
		Overhead: sb.Overhead, Resources: sb.Resources, Config: sb.Config, Waiting: sb.Waiting,
	}
	if !sb.Ready {
		i.ProcessStatus = "stopped"
	}
	return i
}

// containerInfo is what a verbose status of a container adds; field names as with sandboxInfo.
type containerInfo struct {
	SandboxID   string               `json:"sandboxID"`
	PID         int                  `json:"pid"`
	CgroupPath  string               `json:"cgroupPath,omitempty"`
	Config      *cri.ContainerConfig `json:"config"`
	RuntimeSpec json.RawMessage      `json:"runtimeSpec,omitempty"`
}

func newContainerInfo(c *pods.Container, runtimeSpec json.RawMessage) *containerInfo {
	return &containerInfo{SandboxID: c.SandboxID, PID: c.PID, CgroupPath: string(c.CgroupPath), Config: c.Config, RuntimeSpec: runtimeSpec}
}

// info is the form in which CRI carries them: JSON under the key "info", which crictl unfolds.
func info(v any) (map[string]string, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("verbose info: %w", err)
	}
	return map[string]string{"info": string(data)}, nil
}
