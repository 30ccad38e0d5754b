//go:build integration

package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const hostPIDPod podKind = "host-pid" // in the node's PID namespace

// hostNamespace is one of the node's namespaces, as a link in /proc shows it.
func hostNamespace(t *testing.T, kind string) string {
	t.Helper()
	link, err := os.Readlink("/proc/self/ns/" + kind)
	must(t, err)
	return link + "\n"
}

// namespaceFields are about what a container shares with whom.
func namespaceFields() []fieldGroup {
	const show = "readlink /proc/self/ns/"
	pid := func(m runtimeapi.NamespaceMode) func(*runtimeapi.ContainerConfig) {
		return withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: m}
		})
	}
	target := func(id string) func(*runtimeapi.ContainerConfig) {
		return withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: id}
		})
	}
	return []fieldGroup{{"namespaces", []fieldCase{
		{"network of the pod", "NamespaceOption.network", func(t *testing.T, f *fields) {
			p := f.pod(t, plainPod)
			a, b := f.gives(t, p, f.ctr(show+"net")), f.gives(t, p, f.ctr(show+"net"))
			if a != b || a == hostNamespace(t, "net") {
				t.Errorf("two containers are in %q and %q, the node in %q", a, b, hostNamespace(t, "net"))
			}
			if st := f.podStatus(t, p.id); st.Network.GetIp() == "" || st.Linux.Namespaces.Options.Network != runtimeapi.NamespaceMode_POD {
				t.Errorf("status %v", st)
			}
		}},
		{"network of the node", "NamespaceOption.network", func(t *testing.T, f *fields) {
			p := f.pod(t, hostNetworkPod)
			cfg := f.ctr(show+"net; "+show+"uts", withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
				s.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
			}))
			f.says(t, p, cfg, hostNamespace(t, "net")+hostNamespace(t, "uts"))
			if st := f.podStatus(t, p.id); st.Network.GetIp() != "" || st.Linux.Namespaces.Options.Network != runtimeapi.NamespaceMode_NODE {
				t.Errorf("status %v", st)
			}
		}},
		{"IPC of the pod", "NamespaceOption.ipc", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, nil)
			f.start(t, p, f.ctr("echo mine > /dev/shm/x; ipcmk -Q 2>/dev/null; "+show+"ipc; sleep 86400"))
			other := f.gives(t, p, f.ctr("i=0; until cat /dev/shm/x 2>/dev/null || [ $i = 300 ]; do i=$((i+1)); sleep 0.1; done; "+show+"ipc; df /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"))
			lines := strings.Split(other, "\n")
			if len(lines) != 4 || lines[0] != "mine" || lines[1]+"\n" == hostNamespace(t, "ipc") || lines[2] != "65536" {
				t.Errorf("another container of the pod sees %q", other)
			}
			f.says(t, f.pod(t, plainPod), f.ctr("test -e /dev/shm/x || echo nothing"), "nothing\n")
		}},
		{"IPC of the node", "NamespaceOption.ipc", func(t *testing.T, f *fields) {
			name := fmt.Sprintf("/dev/shm/berth-fields-%d", os.Getpid())
			must(t, os.WriteFile(name, []byte("the node's"), 0o644))
			t.Cleanup(func() { must(t, os.Remove(name)) })
			cfg := f.ctr(show+"ipc; cat "+name, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
				s.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
			}))
			p := f.pod(t, hostIPCPod)
			f.says(t, p, cfg, hostNamespace(t, "ipc")+"the node's")
			if st := f.podStatus(t, p.id); st.Linux.Namespaces.Options.Ipc != runtimeapi.NamespaceMode_NODE {
				t.Errorf("status %v", st)
			}
		}},
		{"PIDs of the container", "NamespaceOption.pid LinuxContainerSecurityContext.namespace_options", func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr("echo $$", pid(runtimeapi.NamespaceMode_CONTAINER)), "1\n")
		}},
		{"PIDs of the pod", "NamespaceOption.pid", func(t *testing.T, f *fields) {
			p := f.newPod(t, sharedPIDPod, nil)
			f.start(t, p, f.ctr("exec sleep 4242", pid(runtimeapi.NamespaceMode_POD)))
			got := f.gives(t, p, f.ctr("test $$ != 1 && echo not one; i=0; until ps -o args | grep -q '^sleep 4242' || [ $i = 300 ]; do i=$((i+1)); sleep 0.1; done; ps -o args | grep -c '^sleep 4242'", pid(runtimeapi.NamespaceMode_POD)))
			if got != "not one\n1\n" {
				t.Errorf("another container sees %q", got)
			}
		}},
		{"PIDs of the node", "NamespaceOption.pid", func(t *testing.T, f *fields) {
			f.says(t, f.hostPID(t), f.ctr(show+"pid; test -d /proc/"+fmt.Sprint(os.Getpid())+" && echo sees the test", pid(runtimeapi.NamespaceMode_NODE)), hostNamespace(t, "pid")+"sees the test\n")
		}},
		{"PIDs of another container", "NamespaceOption.target_id", func(t *testing.T, f *fields) {
			p := f.pod(t, plainPod)
			id := f.start(t, p, f.ctr("exec sleep 2424"))
			f.says(t, p, f.ctr("tr '\\0' ' ' < /proc/1/cmdline; test $$ != 1 && echo; "+show+"net > /dev/null", target(id)), "sleep 2424 \n")
		}},
		{"a target that has ended", "NamespaceOption.target_id", func(t *testing.T, f *fields) {
			p := f.pod(t, plainPod)
			id := f.start(t, p, f.ctr("true"))
			_, err := f.CRI.WaitExit(t.Context(), id, waitLong)
			must(t, err)
			f.refused(t, p, f.ctr("true", target(id)), codes.FailedPrecondition, "target_id")
		}},
		{"a target of another pod", "NamespaceOption.target_id", func(t *testing.T, f *fields) {
			id := f.start(t, f.newPod(t, plainPod, nil), f.idle(""))
			f.refused(t, f.pod(t, plainPod), f.ctr("true", target(id)), codes.FailedPrecondition, "target_id")
		}},
		{"a target that ends before the start", "NamespaceOption.target_id", func(t *testing.T, f *fields) {
			p := f.pod(t, plainPod)
			id := f.start(t, p, f.idle(""))
			cfg := f.ctr("echo should not run; sleep 86400", target(id))
			late, err := f.CRI.Create(t.Context(), p.id, p.cfg, cfg)
			must(t, err)
			t.Cleanup(func() { f.remove(t, late) })
			f.kill(t, id)
			if _, err := f.CRI.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: late}); err == nil {
				// The kernel ends with a namespace's first process all others in it: it was too late to start anything.
				if st, err := f.CRI.WaitExit(t.Context(), late, waitLong); err != nil || st.ExitCode == 0 {
					t.Errorf("it runs: %v, %v", st, err)
				}
			} else if !f.peer {
				wantCode(t, err, codes.FailedPrecondition)
			}
			if st := f.status(t, late); st.State != runtimeapi.ContainerState_CONTAINER_EXITED && !f.peer {
				t.Errorf("state %v", st.State)
			}
			if text := f.log(t, p, cfg); strings.Contains(text, "should not") {
				t.Errorf("it has run: %q", text)
			}
		}},
		{"the node's are for pods that have them", "NamespaceOption.pid NamespaceOption.ipc NamespaceOption.network", func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd takes the sandbox's and says nothing")
			}
			for field, o := range map[string]*runtimeapi.NamespaceOption{
				"pid": {Pid: runtimeapi.NamespaceMode_NODE}, "ipc": {Ipc: runtimeapi.NamespaceMode_NODE}, "network": {Network: runtimeapi.NamespaceMode_NODE},
			} {
				f.refused(t, f.pod(t, plainPod), f.ctr("true", withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NamespaceOptions = o })),
					codes.InvalidArgument, "namespace_options."+field)
			}
		}},
		{"options are told as given", "LinuxSandboxSecurityContext.namespace_options NamespaceOption.userns_options UserNamespace.mode", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) {
				c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}
			})
			if st := f.podStatus(t, p.id); !f.peer && !proto.Equal(st.Linux.Namespaces.Options, p.cfg.Linux.SecurityContext.NamespaceOptions) {
				t.Errorf("status %v", st.Linux.Namespaces.Options)
			}
			f.says(t, p, f.ctr(show+"user", withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
				s.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}
			})), hostNamespace(t, "user"))
		}},
	}}}
}

// hostPID is a pod in the node's PID namespace.
func (f *fields) hostPID(t *testing.T) *securityPod {
	t.Helper()
	if f.pods[hostPIDPod] == nil {
		cfg := f.podConfig(hostPIDPod)
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_NODE
		f.pods[hostPIDPod] = f.runPod(t, cfg)
	}
	return f.pods[hostPIDPod]
}

// kill ends a container at once.
func (f *fields) kill(t *testing.T, id string) {
	t.Helper()
	_, err := f.CRI.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id})
	must(t, err)
}
