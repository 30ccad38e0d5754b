//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// registryDown has a pod want an image while there is no registry: it waits for it, and what runs and what is on the node goes on.
func (s story) registryDown() {
	node := s.c.Nodes[len(s.c.Nodes)-1]
	s.pushBulky()
	l := s.underLoad()
	s.endProcess(s.c.Program("registry")+"\x00serve\x00", syscall.SIGKILL)
	must(s.t, s.c.Apply(s.t.Context(), onNode(node, "patient", `restartPolicy: Never, containers: [{name: main, image: "`+bulkyImage+`"}]`)))
	s.says("the registry that is down", []string{
		`Reason: +(ErrImagePull|ImagePullBackOff)`, `Failed to pull image "` + strings.ReplaceAll(bulkyImage, ".", `\.`) + `": .*` + s.c.Registry() + `.*connection refused`,
	}, "describe", "pod", "patient")
	s.scaleWeb(3, nil) // of an image that is there
	must(s.t, s.c.StartRegistry(s.t.Context()))
	s.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/patient", "--timeout", long.String())
	if out := s.kubectl("logs", "patient"); out != "I am bulky\n" {
		s.t.Errorf("the pod says %q", out)
	}
	s.kubectl("delete", "pod", "patient")
	s.scaleWeb(2, nil)
	l.end(s.t)
}

// fullDisk leaves not a byte of a node's disk: new pods say why they cannot begin, and begin when there is room.
func (s story) fullDisk() {
	node := s.small()
	lives := s.lives("web", "shell")
	l := s.underLoad()
	s.fillDisk(node, 16<<20) // the file system needs some for itself
	out, err := node.Command(s.t.Context(), "dd", "if=/dev/zero", "of="+ballast+".rest", "bs=4k").CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("No space left on device")) {
		s.t.Fatalf("the disk is not full: %v: %s", err, out)
	}
	must(s.t, s.c.Apply(s.t.Context(), onNode(node, "cramped", `containers: [{name: main, image: IMAGE, command: [sleep, "86400"]}]`)))
	s.says("the full disk", []string{`Warning .*no space left on device`}, "describe", "pod", "cramped")
	s.liveOn(lives)
	s.emptyDisk(node)
	s.ready("cramped", 1, long, nil)
	s.kubectl("delete", "pod", "cramped")
	l.end(s.t)
}

// outage is for how long the API server is gone.
func (s story) outage() time.Duration {
	text := os.Getenv("BERTH_OUTAGE")
	if text == "" {
		return 20 * time.Second
	}
	d, err := time.ParseDuration(text)
	must(s.t, err)
	return d
}

// serverGone kills the API server: the page goes on, a container that dies is restarted, berth as well, and what was missed is made up for.
func (s story) serverGone() {
	web := s.ready("web", 2, long, nil)
	pod, node := web[0], s.c.Nodes[0]
	before := s.restarts(pod.Metadata.Name)
	l := s.underLoad()
	s.endProcess(s.c.Program("kube-apiserver")+"\x00", syscall.SIGKILL)
	gone := time.Now()
	if _, err := s.c.Kubectl(s.t.Context(), "describe", "pod", pod.Metadata.Name); err == nil || !strings.Contains(err.Error(), "The connection to the server "+s.c.HostAddress()+":6443 was refused") {
		s.t.Errorf("kubectl describe says %v", err)
	}
	collectors := func() (pids []int) {
		for _, pid := range cgroupProcesses(s.t, "pod"+pod.Metadata.UID) {
			if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && bytes.HasPrefix(args, []byte("/bin/collector\x00")) {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	was := collectors()
	if len(was) != 1 {
		s.t.Fatalf("%d collectors run in %s", len(was), pod.Metadata.Name)
	}
	must(s.t, syscall.Kill(was[0], syscall.SIGKILL))
	s.endProgram(node, "berth.yaml", syscall.SIGKILL)
	must(s.t, node.StartBerth(s.t.Context()))
	s.eventually(long, "the container is restarted without an API server", func(context.Context) error {
		if is := collectors(); len(is) != 1 || is[0] == was[0] {
			return fmt.Errorf("processes %v", is)
		}
		return nil
	})
	select {
	case <-time.After(s.outage() - time.Since(gone)): // the load goes on meanwhile
	case <-s.t.Context().Done():
		s.t.Fatal(s.t.Context().Err())
	}
	must(s.t, s.c.StartAPIServer(s.t.Context()))
	s.t.Logf("the API server was gone for %.1f s", time.Since(gone).Seconds())
	for _, n := range s.c.Nodes {
		must(s.t, n.WaitReady(s.t.Context(), long))
	}
	s.eventually(long, "the restart is told", func(context.Context) error {
		if got := s.restarts(pod.Metadata.Name); got != strings.Replace(before, "collector=0", "collector=1", 1) {
			return errors.New(got)
		}
		return nil
	})
	s.says("how the container ended", []string{`Last State: +Terminated\s+Reason: +Error\s+(Message: .*\s+)?Exit Code: +137`}, "describe", "pod", pod.Metadata.Name)
	s.answers("each of those that are new", s.scaleWeb(4, nil), pageAt("http://"+s.clusterIP("web")+"/", ""))
	s.scaleWeb(2, nil)
	l.end(s.t)
}
