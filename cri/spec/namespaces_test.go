package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestNamespaces(t *testing.T) {
	const pod, own, node, target = cri.NamespaceMode_POD, cri.NamespaceMode_CONTAINER, cri.NamespaceMode_NODE, cri.NamespaceMode_TARGET
	for _, c := range []struct {
		name           string
		sandbox, own   *cri.NamespaceOption
		want           string
		class          error
		words          string
		sharedPID, uts bool
	}{
		{"as the kubelet asks", &cri.NamespaceOption{Pid: own}, &cri.NamespaceOption{Pid: own}, "mount network=/net uts=/uts ipc=/ipc pid cgroup", nil, "", false, true},
		{"defaults of the CRI", nil, nil, "mount network=/net uts=/uts ipc=/ipc pid=/pid cgroup", nil, "", true, true},
		{"host network", &cri.NamespaceOption{Network: node, Pid: own}, &cri.NamespaceOption{Network: node, Pid: own}, "mount ipc=/ipc pid cgroup", nil, "", false, false},
		{"POD in a pod on the host's network", &cri.NamespaceOption{Network: node, Pid: own}, &cri.NamespaceOption{Pid: own}, "mount ipc=/ipc pid cgroup", nil, "", false, false},
		{"host IPC", &cri.NamespaceOption{Ipc: node, Pid: own}, &cri.NamespaceOption{Ipc: node, Pid: own}, "mount network=/net uts=/uts pid cgroup", nil, "", false, true},
		{"host PID", &cri.NamespaceOption{Pid: node}, &cri.NamespaceOption{Pid: node}, "mount network=/net uts=/uts ipc=/ipc cgroup", nil, "", false, true},
		{"POD in a pod with the host's processes", &cri.NamespaceOption{Pid: node}, nil, "mount network=/net uts=/uts ipc=/ipc cgroup", nil, "", false, true},
		{"own processes in such a pod", &cri.NamespaceOption{Pid: node}, &cri.NamespaceOption{Pid: own}, "mount network=/net uts=/uts ipc=/ipc pid cgroup", nil, "", false, true},
		{"target", &cri.NamespaceOption{Pid: own}, &cri.NamespaceOption{Pid: target, TargetId: "x"}, "mount network=/net uts=/uts ipc=/ipc pid=/target cgroup", nil, "", false, true},
		{"target without id", &cri.NamespaceOption{Pid: own}, &cri.NamespaceOption{Pid: target}, "", errdefs.ErrInvalidArgument, "target_id", false, true},
		{"host network in another pod", nil, &cri.NamespaceOption{Network: node}, "", errdefs.ErrInvalidArgument, "namespace_options.network: NODE", true, true},
		{"host IPC in another pod", nil, &cri.NamespaceOption{Ipc: node}, "", errdefs.ErrInvalidArgument, "namespace_options.ipc: NODE", true, true},
		{"host PID in another pod", nil, &cri.NamespaceOption{Pid: node}, "", errdefs.ErrInvalidArgument, "namespace_options.pid: NODE", true, true},
		{"network of its own", nil, &cri.NamespaceOption{Network: own}, "", errdefs.ErrInvalidArgument, "network: CONTAINER", true, true},
		{"IPC of a target", nil, &cri.NamespaceOption{Ipc: target}, "", errdefs.ErrInvalidArgument, "ipc: TARGET", true, true},
		{"unknown mode", nil, &cri.NamespaceOption{Pid: 7}, "", errdefs.ErrInvalidArgument, "pid: 7", true, true},
		{"a pod with a target", &cri.NamespaceOption{Pid: target, TargetId: "x"}, nil, "", errdefs.ErrInvalidArgument, "sandbox_config.linux.security_context.namespace_options.pid: TARGET", false, true},
		{"a pod of unknown mode", &cri.NamespaceOption{Network: 9}, nil, "", errdefs.ErrInvalidArgument, "network: 9", true, false},
		{"POD in a pod of containers", &cri.NamespaceOption{Pid: own}, &cri.NamespaceOption{Pid: pod}, "mount network=/net uts=/uts ipc=/ipc pid=/pid cgroup", nil, "", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := request(func(in *Input) {
				podSecurity(in).NamespaceOptions, security(in).NamespaceOptions = c.sandbox, c.own
				in.Namespaces = Namespaces{Net: "/net", IPC: "/ipc", UTS: "/uts", PID: "/pid", Target: "/target"}
			})
			out, err := Container(in)
			if c.class != nil {
				refused(t, err, c.class, c.words)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range out.Spec.Linux.Namespaces {
				s := string(n.Type)
				if n.Path != "" {
					s += "=" + n.Path
				}
				got = append(got, s)
			}
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("got  %s\nwant %s", s, c.want)
			}
			if SharedPID(in.Sandbox) != c.sharedPID {
				t.Errorf("SharedPID is %v", !c.sharedPID)
			}
			if HostNetwork(in.Sandbox) == c.uts {
				t.Errorf("HostNetwork is %v", c.uts)
			}
			if out.Spec.Hostname != "" {
				t.Errorf("hostname %q would be set again for each container", out.Spec.Hostname)
			}
		})
	}
}

func TestNamespaceThatThePodLacks(t *testing.T) {
	for word, change := range map[string]func(*Input){
		"network": func(in *Input) { in.Namespaces.Net = "" },
		"ipc":     func(in *Input) { in.Namespaces.IPC = "" },
		"uts":     func(in *Input) { in.Namespaces.UTS = "" },
		"share":   func(in *Input) { security(in).NamespaceOptions = nil },
		"target": func(in *Input) {
			security(in).NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "x"}
		},
	} {
		_, err := Container(request(change))
		refused(t, err, errdefs.ErrFailedPrecondition, "namespace", word)
	}
}

func second[T any](_ T, err error) error { return err }
