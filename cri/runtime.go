package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/internal/version"
	"github.com/berth-run/berth/network"
)

// What Version says. The kubelet and crictl refuse any other version of the kubelet's runtime API, and empty fields.
const (
	kubeAPIVersion = "0.1.0"
	runtimeName    = "berth"
	apiVersion     = "v1"
)

// Version is the first call of every client.
func (s *Server) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{
		Version:           kubeAPIVersion,
		RuntimeName:       runtimeName,
		RuntimeVersion:    version.Version,
		RuntimeApiVersion: apiVersion,
	}, nil
}

// storageReady is a condition of berth's own: whether the file systems of its records, images and pods can be written to.
// The kubelet reads the two others only.
const storageReady = "StorageReady"

// Status says whether pods can be run, asked every five seconds. A node is NotReady while RuntimeReady or NetworkReady is
// false, and shows its message.
func (s *Server) Status(ctx context.Context, req *cri.StatusRequest) (*cri.StatusResponse, error) {
	netErr := s.network.Ready()
	resp := &cri.StatusResponse{
		Status:          &cri.RuntimeStatus{Conditions: conditions(s.pods.Health(ctx), netErr)},
		RuntimeHandlers: s.handlers,
		Features: &cri.RuntimeFeatures{
			SupplementalGroupsPolicy: true, MountOptions: true, UserNamespacesHostNetwork: s.userns,
		},
	}
	if req.GetVerbose() {
		var err error
		if resp.Info, err = s.statusInfo(netErr); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

func conditions(h pods.Health, netErr error) []*cri.RuntimeCondition {
	var net *pods.Problem
	if netErr != nil {
		net = &pods.Problem{Reason: "NetworkPluginNotReady", Message: netErr.Error()}
	}
	return []*cri.RuntimeCondition{
		condition(cri.RuntimeReady, h.Runtime), condition(cri.NetworkReady, net), condition(storageReady, h.Storage),
	}
}

func condition(name string, p *pods.Problem) *cri.RuntimeCondition {
	if p == nil {
		return &cri.RuntimeCondition{Type: name, Status: true}
	}
	return &cri.RuntimeCondition{Type: name, Reason: p.Reason, Message: p.Message}
}

// runtimeHandlers is one handler, the default. It must be listed by its empty name: the kubelet looks there for what a pod
// without a runtime class may ask for.
func runtimeHandlers(recursiveReadOnly, userns bool) []*cri.RuntimeHandler {
	return []*cri.RuntimeHandler{{
		Name:     "",
		Features: &cri.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: recursiveReadOnly, UserNamespaces: userns},
	}}
}

// checkHandler refuses the name of a handler, which a field has, unless there is one.
func (s *Server) checkHandler(field, name string) error {
	for _, h := range s.handlers {
		if h.GetName() == name {
			return nil
		}
	}
	return invalid(field, name, "there is no such handler, only the default (\"\")")
}

// statusInfo is what `crictl info` shows beside the conditions.
func (s *Server) statusInfo(netErr error) (map[string]string, error) {
	ready := "ready"
	if netErr != nil {
		ready = netErr.Error()
	}
	info := map[string]any{
		"config":         s.info,
		"version":        version.String(),
		"golang":         runtime.Version(),
		"goroutines":     runtime.NumGoroutine(),                            // the first thing to look at where memory grows
		"podCIDRs":       append([]netip.Prefix{}, s.network.PodCIDRs()...), // none is [], not null
		"network":        ready,
		"currentNetwork": s.network.Current(),
		"networksOwed":   append([]network.Owed{}, s.network.Owed()...),
	}
	if s.routes != nil {
		info["nodeRoutes"] = s.routes()
	}
	out := map[string]string{}
	for key, value := range info {
		data, err := json.Marshal(value)
		if err != nil {
			return nil, fmt.Errorf("verbose info: %s: %w", key, err)
		}
		out[key] = string(data)
	}
	return out, nil
}

// RuntimeConfig tells the cgroup driver, which the kubelet then uses, too. It is set on purpose: the enumeration's zero
// value is the other one.
func (s *Server) RuntimeConfig(context.Context, *cri.RuntimeConfigRequest) (*cri.RuntimeConfigResponse, error) {
	driver := cri.CgroupDriver_CGROUPFS
	if s.driver == cgroups.Systemd {
		driver = cri.CgroupDriver_SYSTEMD
	}
	return &cri.RuntimeConfigResponse{Linux: &cri.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig hands the node's pod CIDRs to the network. It always succeeds: an error would make the kubelet log and repeat it
// with every status update.
func (s *Server) UpdateRuntimeConfig(_ context.Context, req *cri.UpdateRuntimeConfigRequest) (*cri.UpdateRuntimeConfigResponse, error) {
	s.network.SetPodCIDRs(req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr())
	return &cri.UpdateRuntimeConfigResponse{}, nil
}
