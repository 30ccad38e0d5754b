package lab

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Pod is what a kubelet says of a pod, as far as tests look at it (the fields of v1.Pod).
type Pod struct {
	Metadata struct {
		Name, Namespace, UID string
	}
	Status struct {
		Phase, Reason, Message                                               string
		PodIP, HostIP                                                        string
		Conditions                                                           []struct{ Type, Status, Reason, Message string }
		Resources                                                            *Resources
		ContainerStatuses, InitContainerStatuses, EphemeralContainerStatuses []ContainerStatus
	}
}

// Resources are requests and limits, in the canonical form of Kubernetes' quantities.
type Resources struct{ Requests, Limits map[string]string }

// ContainerStatus is what a kubelet says of a container (v1.ContainerStatus).
type ContainerStatus struct {
	Name         string
	ContainerID  string
	Ready        bool
	Started      *bool
	RestartCount int
	State        ContainerState
	LastState    ContainerState
	Resources    *Resources
	StopSignal   string
	User         *struct {
		Linux *struct {
			UID, GID           int64
			SupplementalGroups []int64
		}
	}
	VolumeMounts []struct {
		Name, MountPath   string
		RecursiveReadOnly string
	}
}

// ContainerState has one of its members set.
type ContainerState struct {
	Running    *struct{ StartedAt time.Time }
	Waiting    *struct{ Reason, Message string }
	Terminated *struct {
		ExitCode        int
		Reason, Message string
	}
}

// String tells the state in a word or two.
func (s ContainerState) String() string {
	switch {
	case s.Running != nil:
		return "running"
	case s.Terminated != nil:
		return fmt.Sprintf("terminated (%s, exit code %d)", s.Terminated.Reason, s.Terminated.ExitCode)
	case s.Waiting != nil:
		return fmt.Sprintf("waiting (%s: %s)", s.Waiting.Reason, s.Waiting.Message)
	}
	return "unknown"
}

func (p *Pod) lists() [][]ContainerStatus {
	return [][]ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses}
}

// Container is the status of one container of the pod, of whichever kind; the zero value if there is none.
func (p *Pod) Container(name string) ContainerStatus {
	for _, list := range p.lists() {
		for _, c := range list {
			if c.Name == name {
				return c
			}
		}
	}
	return ContainerStatus{}
}

// Condition tells whether the pod's condition of that type is true.
func (p *Pod) Condition(kind string) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c.Status == "True"
		}
	}
	return false
}

// String tells the pod's state in a line.
func (p *Pod) String() string {
	words := []string{"phase " + p.Status.Phase}
	if p.Status.Reason != "" {
		words = append(words, p.Status.Reason+": "+p.Status.Message)
	}
	for _, list := range p.lists() {
		for _, c := range list {
			words = append(words, fmt.Sprintf("%s %s, ready %t, restarts %d", c.Name, c.State, c.Ready, c.RestartCount))
		}
	}
	return strings.Join(words, "; ")
}

// Running wants all containers of the pod to run and be ready.
func Running(p *Pod) error {
	if p.Status.Phase != "Running" || !p.Condition("Ready") {
		return errors.New("it is not running and ready")
	}
	return nil
}
