//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
)

// top has metrics-server run, and asks what kubectl top shows: of each node, and of each container of the page, what can be true of it.
func (s story) top() {
	if tools.MetricsServer == "" {
		s.t.Fatal("BERTH_TOOLS does not have metrics-server")
	}
	began := time.Now()
	must(s.t, s.c.StartMetrics(s.t.Context(), tools.MetricsServer))
	s.t.Logf("metrics-server is pushed, pulled, ready and behind the API server in %.1f s", time.Since(began).Seconds())
	s.eventually(long, "kubectl top nodes", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "top", "nodes", "--no-headers")
		if err != nil {
			return err
		}
		for _, n := range s.c.Nodes {
			memory, err := s.c.Kubectl(ctx, "get", "node", n.Name, "-o", "jsonpath={.status.capacity.memory}")
			if err != nil {
				return err
			}
			// NAME CPU CPU% MEMORY MEMORY%
			if err := usage(out, []string{n.Name}, 1, 3, "1Mi", memory); err != nil {
				return err
			}
		}
		return nil
	})
	web := s.ready("web", 2, long, nil)
	s.eventually(long, "kubectl top pods", func(ctx context.Context) error {
		of := []string{"top", "pods", "-l", "app=web", "--no-headers"}
		pods, err := s.c.Kubectl(ctx, of...)
		if err != nil {
			return err
		}
		containers, err := s.c.Kubectl(ctx, append(of, "--containers")...)
		if err != nil {
			return err
		}
		for _, p := range web {
			// NAME CPU MEMORY
			if err := usage(pods, []string{p.Metadata.Name}, 1, 2, "3Mi", "128Mi"); err != nil {
				return err
			}
			// POD NAME CPU MEMORY, with the limits of web.yaml. Less than 1 Mi is shown as none.
			for container, limit := range map[string]string{"web": "64Mi", "collector": "32Mi", "exporter": "32Mi"} {
				if err := usage(containers, []string{p.Metadata.Name, container}, 2, 3, "0", limit); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// usage finds the line of kubectl top that begins with these words, and what it has in the columns of CPU and memory.
func usage(table string, begins []string, cpu, memory int, least, most string) error {
	for line := range strings.Lines(table) {
		words := strings.Fields(line)
		if len(words) <= max(cpu, memory) || !slices.Equal(words[:len(begins)], begins) {
			continue
		}
		if _, err := resource.ParseQuantity(words[cpu]); err != nil {
			return fmt.Errorf("CPU: %q: %w", line, err)
		}
		used, err := resource.ParseQuantity(words[memory])
		if err != nil || used.Cmp(resource.MustParse(least)) < 0 || used.Cmp(resource.MustParse(most)) > 0 {
			return fmt.Errorf("memory: %q is not between %s and %s (%v)", line, least, most, err)
		}
		return nil
	}
	return fmt.Errorf("nothing of %v in:\n%s", begins, table)
}

const scalerManifest = `apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: web}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: web}
  minReplicas: 2
  maxReplicas: 4
  metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 100}}}]
  behavior: {scaleDown: {stabilizationWindowSeconds: 5}}
`

// autoscale has the page asked for 800 times a second, and then less: there are more pods, and fewer again, and no request fails.
func (s story) autoscale() {
	must(s.t, s.c.Apply(s.t.Context(), scalerManifest))
	s.t.Cleanup(func() { // also where this fails: later chapters set the number themselves
		for _, args := range [][]string{{"delete", "horizontalpodautoscaler", "web"}, {"scale", "deployment/web", "--replicas", "2"}} {
			if _, err := s.c.Kubectl(context.Background(), args...); err != nil {
				s.t.Error(err)
			}
		}
	})
	replicas := func(what string, want func(int) bool) {
		began := time.Now()
		var last string
		s.eventually(2*long, what, func(ctx context.Context) error {
			out, err := s.c.Kubectl(ctx, "get", "deployment", "web", "-o", "jsonpath={.spec.replicas}")
			if err != nil {
				return err
			}
			if last, err = s.c.Kubectl(ctx, "get", "horizontalpodautoscaler", "web", "--no-headers"); err != nil {
				return err
			}
			var n int
			if _, err := fmt.Sscan(out, &n); err != nil || !want(n) {
				return errors.Join(err, fmt.Errorf("%s: %s", out, last))
			}
			return nil
		})
		s.t.Logf("%s after %.1f s: %s", what, time.Since(began).Seconds(), strings.Join(strings.Fields(last), " "))
	}
	all := startPacedLoad(s.t, 100*time.Millisecond, s.entrances()...) // on a busy machine, more is enough of a load to stay scaled up
	var more []*load
	for range 4 { // not more: what the web server writes of it has bounds
		more = append(more, startPacedLoad(s.t, 5*time.Millisecond, s.entrances()[0]))
	}
	replicas("scaled up", func(n int) bool { return n > 2 })
	for _, l := range more {
		l.end(s.t)
	}
	replicas("scaled down", func(n int) bool { return n == 2 })
	s.ready("web", 2, long, nil)
	all.end(s.t)
}
