package cri

import (
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
)

// The conditions of a filter are ANDed; what a filter does not set matches everything. An id in a filter matches every id
// that begins with it: all ids have 64 digits, so a full id matches only itself, and a shortened one what the user of
// crictl meant.

func sandboxMatches(f *cri.PodSandboxFilter, sb *pods.Sandbox) bool {
	return strings.HasPrefix(sb.ID, f.GetId()) &&
		(f.GetState() == nil || f.GetState().GetState() == sandboxState(sb)) &&
		labelsMatch(f.GetLabelSelector(), sb.Config.GetLabels())
}

func containerMatches(f *cri.ContainerFilter, c *pods.Container) bool {
	return strings.HasPrefix(c.ID, f.GetId()) &&
		strings.HasPrefix(c.SandboxID, f.GetPodSandboxId()) &&
		(f.GetState() == nil || f.GetState().GetState() == c.State) &&
		labelsMatch(f.GetLabelSelector(), c.Config.GetLabels())
}

func statsMatch(f *cri.ContainerStatsFilter, c *pods.Container) bool {
	return strings.HasPrefix(c.ID, f.GetId()) &&
		strings.HasPrefix(c.SandboxID, f.GetPodSandboxId()) &&
		labelsMatch(f.GetLabelSelector(), c.Config.GetLabels())
}

func labelsMatch(selector, labels map[string]string) bool {
	for k, want := range selector {
		if got, ok := labels[k]; !ok || got != want {
			return false
		}
	}
	return true
}

func sandboxItem(sb *pods.Sandbox) *cri.PodSandbox {
	return &cri.PodSandbox{
		Id:             sb.ID,
		Metadata:       sb.Config.GetMetadata(),
		State:          sandboxState(sb),
		CreatedAt:      nanos(sb.CreatedAt),
		Labels:         sb.Config.GetLabels(),
		Annotations:    sb.Config.GetAnnotations(),
		RuntimeHandler: sb.Handler,
	}
}

func containerItem(c *pods.Container) *cri.Container {
	return &cri.Container{
		Id:           c.ID,
		PodSandboxId: c.SandboxID,
		Metadata:     c.Config.GetMetadata(),
		Image:        c.Config.GetImage(),
		ImageRef:     imageRef(c),
		State:        c.State,
		CreatedAt:    nanos(c.CreatedAt),
		Labels:       c.Config.GetLabels(),
		Annotations:  c.Config.GetAnnotations(),
		ImageId:      c.ImageID,
	}
}
