//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
)

// TestClusterOfOne is the smallest of clusters: one node and one Deployment behind a Service. A cluster of an index that is in use is
// refused, and its end is not that of the other. Daemons that were killed are started again, and those that somebody has started by hand end with
// the cluster.
func TestClusterOfOne(t *testing.T) {
	if os.Getenv("BERTH_CLUSTER") == "" {
		t.Skip("make test-cluster runs it")
	}
	index := clusterIndex(t, 7)
	log := timed(t)
	c := newCluster(t, cluster.Start, cluster.Options{Index: index, Nodes: 1})
	s := story{t, c}
	must(t, c.Apply(t.Context(), clusterManifest))
	web := s.ready("web", 2, 2*time.Minute, onNodes("node-1", "node-1"))
	log("the Deployment is ready")
	address, port, _ := strings.Cut(s.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}"), " ")
	s.answers("the cluster IP, from this machine", web, fromHost(address))
	s.answers("the node port", web, fromHost(c.Nodes[0].Address()+":"+port))
	log("the Service answers with each pod")
	other := filepath.Join(t.TempDir(), "other")
	if _, err := cluster.Start(t.Context(), cluster.Options{Dir: other, Index: index, Tools: clusterTools()}); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("index: %d is another cluster's", index)) {
		t.Errorf("a second cluster of the same index: %v", err)
	}
	must(t, cluster.Down(other)) // which is none, and takes nothing of this one down
	if err := cluster.Sweep(index); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("berth-cl%d", index)) {
		t.Errorf("sweep the index of a cluster that is up: %v", err)
	}
	s.killContainer()
	log("a killed container was started again")
	s.startAgain()
	log("a node's daemons were killed and started again")
	byHand := s.startByHand()
	log("a node's daemons were killed and started by hand")
	must(t, cluster.Down(c.Dir))
	for _, cmd := range byHand {
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid)); err == nil {
			t.Errorf("%s, started by hand, outlives the cluster", strings.Join(cmd.Args, " "))
			must(t, cmd.Process.Kill())
		}
		_ = cmd.Wait() // it was killed
	}
	// As a kubelet makes them again that outlives its cluster.
	for _, name := range []string{"", "/node-1", "/node-1/kubepods"} {
		must(t, lab.MakeCgroup(fmt.Sprintf("/berth-cluster%d%s", index, name)))
	}
	must(t, cluster.Sweep(index))
}

// killDaemons kills the node's daemons, and returns their command lines.
func (s story) killDaemons(n *cluster.Node) [][]string {
	s.t.Helper()
	all, err := n.Processes()
	must(s.t, err)
	var commands [][]string
	for _, daemon := range []string{"berth serve ", "kubelet ", "berth proxy "} {
		for pid, command := range all {
			if strings.HasPrefix(command, filepath.Join(s.c.Dir, "bin", daemon)) {
				commands = append(commands, strings.Fields(command))
				must(s.t, syscall.Kill(pid, syscall.SIGKILL))
			}
		}
	}
	if len(commands) != 3 {
		s.t.Fatalf("of the three daemons of %s these ran: %v", n.Name, commands)
	}
	s.eventually(time.Minute, "the daemons have ended", func(context.Context) error {
		now, err := n.Processes()
		for pid := range now {
			for _, command := range commands {
				if now[pid] == strings.Join(command, " ") {
					err = fmt.Errorf("%s is there", now[pid])
				}
			}
		}
		return err
	})
	return commands
}

// startAgain kills the daemons and has those started that do not run. Pods know nothing of it.
func (s story) startAgain() {
	node, before := s.c.Nodes[0], s.ready("web", 2, time.Minute, nil)
	s.killDaemons(node)
	must(s.t, node.Start(s.t.Context()))
	after, err := node.Processes()
	must(s.t, err)
	must(s.t, node.Start(s.t.Context())) // all run
	again, err := node.Processes()
	must(s.t, err)
	for pid, command := range again {
		if strings.HasPrefix(command, filepath.Join(s.c.Dir, "bin")) && after[pid] == "" && !forked(pid, after) {
			s.t.Errorf("%s was started though it ran", command)
		}
	}
	must(s.t, node.WaitReady(s.t.Context(), 2*time.Minute))
	web := s.ready("web", 2, time.Minute, nil)
	for i := range web {
		if is, was := web[i].Status.ContainerStatuses[0].ContainerID, before[i].Status.ContainerStatuses[0].ContainerID; is != was {
			s.t.Errorf("%s has the container %s, and before its node's daemons were killed %s", web[i].Metadata.Name, is, was)
		}
	}
	s.answers("the Service", web, fromHost(strings.TrimSpace(s.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"))))
}

// forked says whether a process is one that a daemon has made to run another program, and that still has the daemon's command line; or has ended
// meanwhile.
func forked(pid int, daemons map[int]string) bool {
	status, err := statusOf(pid)
	parent, _ := strconv.Atoi(status["PPid"])
	return err != nil || daemons[parent] != ""
}

// startByHand kills the daemons and starts them as one does in a shell on the node: in no cgroup of the cluster's.
func (s story) startByHand() []*exec.Cmd {
	node := s.c.Nodes[0]
	var started []*exec.Cmd
	for _, command := range s.killDaemons(node) {
		cmd := node.Command(context.Background(), command...)
		must(s.t, cmd.Start())
		started = append(started, cmd)
		s.eventually(time.Minute, "the runtime answers", func(ctx context.Context) error { // a kubelet ends where none does
			return node.Command(ctx, s.c.Program("berth"), "images", "list").Run()
		})
	}
	s.eventually(2*time.Minute, "the kubelet that was started by hand answers", func(ctx context.Context) error {
		_, err := s.c.Kubectl(ctx, "get", "--raw", "/api/v1/nodes/"+node.Name+"/proxy/healthz")
		return err
	})
	return started
}
