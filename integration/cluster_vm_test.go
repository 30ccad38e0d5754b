//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestClusterNodeInVM has a node with a kernel of its own, and so with cgroup v2 and a clock of its own, in a cluster: it does what nodes do,
// and goes on when its clock is wrong.
func TestClusterNodeInVM(t *testing.T) {
	if os.Getenv("BERTH_CLUSTER_VM") == "" {
		t.Skip("make test-vm-cluster runs it")
	}
	c := newCluster(t, cluster.Start, cluster.Options{Index: 9, Nodes: 2, VMs: 1})
	inOrder(t, storyOf(c), []chapter[story]{
		{"its pods answer", story.machineServes},
		{"its clock is ten years ahead", func(s story) { s.wrongClock(3660*24*time.Hour, "after") }},
		{"its clock is two hours behind", func(s story) { s.wrongClock(-2*time.Hour, "before") }},
		{"its clock is five minutes behind", story.slightlyWrongClock},
	})
}

// pageManifest are pods that stay on their nodes, whatever becomes of these.
const pageManifest = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: page}
spec:
  selector: {matchLabels: {app: page}}
  template:
    metadata: {labels: {app: page}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: page
        image: ` + testimages.Busybox + `
        command: [sh, -c, "mkdir /www; hostname > /www/index.html; echo I begin; exec httpd -f -p 8080 -h /www"]
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 2, timeoutSeconds: 10}
---
apiVersion: v1
kind: Service
metadata: {name: page}
spec:
  selector: {app: page}
  ports: [{port: 80, targetPort: 8080}]
`

// machine is the node in a virtual machine.
func (s story) machine() *cluster.Node { return s.c.Nodes[len(s.c.Nodes)-1] }

// pages are both pods: that of the machine, and the other's.
func (s story) pages() (all []clusterPodStatus, here, there clusterPodStatus) {
	s.t.Helper()
	all = s.ready("page", 2, 10*time.Minute, onNodes("node-1", "node-2"))
	return all, s.on(s.machine(), all), s.on(s.c.Nodes[0], all)
}

func (s story) machineServes() {
	kind, err := s.machine().Command(s.t.Context(), "stat", "--file-system", "--format", "%T", "/sys/fs/cgroup").CombinedOutput()
	if err != nil || strings.TrimSpace(string(kind)) != "cgroup2fs" {
		s.t.Fatalf("/sys/fs/cgroup of the machine is %s, %v", kind, err)
	}
	must(s.t, s.c.Apply(s.t.Context(), pageManifest))
	all, here, there := s.pages()
	address := s.clusterIP("page")
	s.answers("its pod, from this machine", []clusterPodStatus{here}, fromHost(here.Status.PodIP+":8080"))
	s.answers("its pod, from a pod of the other node", []clusterPodStatus{here}, s.fromPod(there, here.Status.PodIP+":8080"))
	s.answers("the Service, from a pod of the other node", all, s.fromPod(there, address))
	s.answers("the Service, from its pod", all, s.fromPod(here, address))
	s.logsAnswer(here)
}

// logsAnswer has the API server ask the machine's kubelet.
func (s story) logsAnswer(pod clusterPodStatus) {
	s.t.Helper()
	s.eventually(long, "kubectl logs", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "logs", pod.Metadata.Name)
		if err == nil && out != "I begin\n" {
			err = fmt.Errorf("they are %q", out)
		}
		return err
	})
}

// answersInMachine waits until the Service answers with each of the pods on the node itself, without any help of the API server. A
// command there takes a second and more: it asks several times.
func (s story) answersInMachine(address string, pods []clusterPodStatus) {
	s.t.Helper()
	s.eventually(long, "the Service answers in the machine", func(ctx context.Context) error {
		out, err := s.machine().Command(ctx, "timeout", "60", "bash", "-ec", `
			for i in 1 2 3 4 5 6 7 8 9 10; do
				exec 3<> "/dev/tcp/$0/80"
				printf 'GET / HTTP/1.0\r\n\r\n' >&3
				cat <&3
			done`, address).CombinedOutput()
		for _, p := range pods {
			if err == nil && !bytes.Contains(out, []byte(p.Metadata.Name)) {
				err = errors.New("no answer of " + p.Metadata.Name)
			}
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// networkOfMachine is what leads its packets: rules without their counters, and routes.
func (s story) networkOfMachine() string {
	s.t.Helper()
	out, err := s.machine().Command(s.t.Context(), "sh", "-euc", "nft --stateless list ruleset; ip route").CombinedOutput()
	if err != nil {
		s.t.Fatalf("rules and routes of the machine: %v: %s", err, out)
	}
	return string(out)
}

// logSays waits until a program of the machine has logged something since a place in its log.
func (s story) logSays(program string, since int64, want string) {
	s.t.Helper()
	pattern := regexp.MustCompile(want)
	s.eventually(long, program+" logs "+want, func(context.Context) error {
		text, err := os.ReadFile(s.machine().Log(program))
		if err == nil && !pattern.Match(text[since:]) {
			err = fmt.Errorf("the end of its log:\n%s", lab.Tail(s.machine().Log(program), 5))
		}
		return err
	})
}

func (s story) logSize(program string) int64 {
	s.t.Helper()
	info, err := os.Stat(s.machine().Log(program))
	must(s.t, err)
	return info.Size()
}

// wrongClock sets the machine's clock so that the API server's certificate is not of its time: all goes on as it was, and who is asked names
// the cause. Then it is set right.
func (s story) wrongClock(by time.Duration, certificateIs string) {
	node := s.machine()
	all, here, _ := s.pages()
	lives, was, address := s.lives("page"), s.networkOfMachine(), s.clusterIP("page")
	cause := `x509: certificate has expired or is not yet valid: current time [^ ]+ is ` + certificateIs + ` \d{4}-`
	programs := map[string]struct{ cause, mended string }{
		"kubelet":     {cause, ``},
		"berth serve": {`level=WARN msg="Nodes cannot be watched: node routes stay as they are" .*` + cause, `msg="Nodes are watched again"`},
		"berth proxy": {`level=WARN msg="the API server does not tell .*: Services stay as they are" .*` + cause + `.*hint="this node's clock is wrong`, `msg="the API server tells what has changed again"`},
	}
	sizes := map[string]int64{}
	for name := range programs {
		sizes[name] = s.logSize(name)
	}
	must(s.t, node.SetClock(s.t.Context(), time.Now().Add(by)))
	defer func() {
		if s.t.Failed() {
			_ = node.SetClock(context.Background(), time.Now()) // for who looks at it
		}
	}()
	must(s.t, node.WaitNotReady(s.t.Context(), long))
	s.says("the kubelet that is not heard of", []string{`Ready +Unknown .*NodeStatusUnknown +Kubelet stopped posting node status\.`}, "describe", "node", node.Name)
	for name, says := range programs {
		s.logSays(name, sizes[name], says.cause)
	}
	out, err := node.Command(s.t.Context(), s.c.Program("berth"), "explain", address+":80").CombinedOutput()
	if err != nil || !regexp.MustCompile(`SILENT +since .* \(\d+m?[\dms]*\) the API server does not tell what changes: .*`+cause).Match(out) {
		s.t.Errorf("berth explain, %v: %s", err, out)
	}
	s.answers("its pod, from this machine", []clusterPodStatus{here}, fromHost(here.Status.PodIP+":8080"))
	s.answersInMachine(address, all)
	if is := s.networkOfMachine(); is != was {
		s.t.Errorf("rules and routes have changed, from\n%s\nto\n%s", was, is)
	}
	for name := range programs {
		sizes[name] = s.logSize(name)
	}

	must(s.t, node.SetClock(s.t.Context(), time.Now()))
	must(s.t, node.WaitReady(s.t.Context(), long))
	for name, says := range programs {
		s.logSays(name, sizes[name], says.mended)
	}
	s.pages()
	s.liveOn(lives)
	s.logsAnswer(here)
}

// slightlyWrongClock sets the machine's clock back, by what no certificate minds. The kubelet takes for the present container which was created
// last: a container that is started again is that one, by a clock that is behind what it was, too.
func (s story) slightlyWrongClock() {
	node := s.machine()
	all, before, _ := s.pages()
	must(s.t, node.SetClock(s.t.Context(), time.Now().Add(-5*time.Minute)))
	if out, err := node.Command(s.t.Context(), "pkill", "--signal", "KILL", "--exact", "httpd").CombinedOutput(); err != nil {
		s.t.Fatalf("kill the container: %v: %s", err, out)
	}
	restarted := func(pods []clusterPodStatus) error {
		was, is := before.Status.ContainerStatuses[0], s.on(node, pods).Status.ContainerStatuses[0]
		if is.RestartCount != was.RestartCount+1 || is.ContainerID == was.ContainerID {
			return fmt.Errorf("it was %+v, and is %+v", was, is)
		}
		return nil
	}
	s.ready("page", 2, long, restarted)
	lives := s.lives("page")
	s.answersInMachine(s.clusterIP("page"), all)
	s.logsAnswer(before)
	must(s.t, node.SetClock(s.t.Context(), time.Now()))
	must(s.t, node.WaitReady(s.t.Context(), long))
	s.ready("page", 2, long, restarted)
	s.liveOn(lives)
}
