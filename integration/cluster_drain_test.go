//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// underLoad asks for the page at all its addresses, until the load is ended.
func (s story) underLoad() *load {
	s.t.Helper()
	return startLoad(s.t, s.entrances()...)
}

// scaleWeb waits until that many are ready and the others are gone.
func (s story) scaleWeb(n int, want func([]clusterPodStatus) error) []clusterPodStatus {
	s.t.Helper()
	s.kubectl("scale", "deployment", "web", "--replicas", fmt.Sprint(n))
	s.count("web", n)
	return s.ready("web", n, long, want)
}

// count waits until an application has that many pods, ready or not.
func (s story) count(app string, n int) {
	s.t.Helper()
	s.eventually(long, fmt.Sprintf("%d pods of %s are there", n, app), func(ctx context.Context) error {
		pods, err := s.pods(ctx, app)
		if err == nil && len(pods) != n {
			err = fmt.Errorf("%d are", len(pods))
		}
		return err
	})
}

// drain takes the second node out of use and back, while the page goes on.
func (s story) drain() {
	stays, node := s.c.Nodes[0], s.c.Nodes[1]
	s.kubectl("create", "poddisruptionbudget", "web", "--selector", "app=web", "--min-available", "1")
	l := s.underLoad()

	s.kubectl("cordon", node.Name)
	before := s.lives("web", "shell")
	pods := s.scaleWeb(3, nil)
	for _, p := range pods {
		if _, ok := before[p.Metadata.UID]; !ok && p.Spec.NodeName == node.Name {
			s.t.Errorf("%s is on %s, which is cordoned", p.Metadata.Name, node.Name)
		}
	}
	s.liveOn(before) // those that were there stay
	if out := s.kubectl("describe", "node", node.Name); !strings.Contains(out, "Unschedulable:      true") || !strings.Contains(out, "node.kubernetes.io/unschedulable:NoSchedule") {
		s.t.Errorf("kubectl describe does not say that the node is cordoned:\n%s", out)
	}

	out := s.kubectl("drain", node.Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout", long.String())
	if !strings.Contains(out, node.Name+" drained") {
		s.t.Errorf("drain says %q", out)
	}
	s.ready("web", 3, long, onNodes(stays.Name, stays.Name, stays.Name))
	s.eventually(long, "only pods of DaemonSets are left on "+node.Name, func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "get", "pods", "-A", "--field-selector", "spec.nodeName="+node.Name,
			"-o", `jsonpath={range .items[*]}{.metadata.ownerReferences[0].kind} {.metadata.name}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "DaemonSet ") {
				err = errors.Join(err, errors.New(line))
			}
		}
		return err
	})
	s.daemonSet()

	s.kubectl("uncordon", node.Name)
	s.scaleWeb(5, func(pods []clusterPodStatus) error {
		for _, p := range pods {
			if p.Spec.NodeName == node.Name {
				return nil
			}
		}
		return errors.New("none is on " + node.Name)
	})
	s.scaleWeb(2, nil)
	l.end(s.t)
	s.kubectl("delete", "poddisruptionbudget", "web")
}

// daemonSet is rolled over all nodes, cordoned ones as well, and taken from a node and back by a label.
func (s story) daemonSet() {
	old := s.lives("shell")
	s.kubectl("set", "env", "daemonset/shell", "EDITION=2")
	s.kubectl("rollout", "status", "daemonset/shell", "--timeout", long.String())
	for _, p := range s.ready("shell", 2, long, onNodes("node-1", "node-2")) {
		if _, ok := old[p.Metadata.UID]; ok {
			s.t.Errorf("%s is of the former edition", p.Metadata.Name)
		}
	}
	s.kubectl("label", "node", "node-1", "shells=yes")
	s.kubectl("patch", "daemonset", "shell", "-p", `{"spec": {"template": {"spec": {"nodeSelector": {"shells": "yes"}}}}}`)
	s.eventually(long, "the DaemonSet leaves the node without the label", func(ctx context.Context) error {
		pods, err := s.pods(ctx, "shell")
		if err == nil {
			err = onNodes("node-1")(pods)
		}
		return err
	})
	s.kubectl("label", "node", "node-2", "shells=yes")
	s.ready("shell", 2, long, onNodes("node-1", "node-2"))
}
