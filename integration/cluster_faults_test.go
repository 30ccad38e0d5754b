//go:build integration

package integration

import (
	"context"
	"fmt"
	"regexp"
	"strings"

	"github.com/berth-run/berth/integration/testimages"
)

// hopelessPods are pods that do not come up, and what an engineer is to read of each.
var hopelessPods = []struct {
	name, spec string
	says       []string // regular expressions, of kubectl describe
}{
	{
		"image-absent", `containers: [{name: main, image: "registry.example/no/such:1"}]`,
		[]string{`Reason: +(ErrImagePull|ImagePullBackOff)`, `Failed to pull image "registry\.example/no/such:1": .*not found`},
	},
	{
		"image-misspelt", `containers: [{name: main, image: "registry.example/Web:1"}]`,
		[]string{`Reason: +InvalidImageName`, `registry\.example/Web:1`},
	},
	{
		"program-absent", `containers: [{name: main, image: IMAGE, command: [/no/such/program]}]`,
		[]string{`/no/such/program`, `no such file or directory`},
	},
	{
		"crash-loop", `containers: [{name: main, image: IMAGE, terminationMessagePolicy: FallbackToLogsOnError, command: [sh, -c, "echo the database is not there; exit 3"]}]`,
		[]string{`Reason: +CrashLoopBackOff`, `Exit Code: +3`, `Message: +the database is not there`, `Back-off restarting failed container main`},
	},
	{
		"out-of-memory", `containers: [{name: main, image: IMAGE, resources: {limits: {memory: 8Mi}}, command: [sh, -c, "exec tail /dev/zero"]}]`,
		[]string{`Reason: +OOMKilled`, `Exit Code: +137`},
	},
	{
		"never-live", `{terminationGracePeriodSeconds: 0, containers: [{name: main, image: IMAGE, command: [sleep, "1000"], livenessProbe: {exec: {command: [sh, -c, "echo I am stuck; exit 1"]}, periodSeconds: 2, timeoutSeconds: 10, failureThreshold: 1}}]}`,
		[]string{`Liveness probe failed: I am stuck`, `failed liveness probe, will be restarted`},
	},
	{
		"volume-absent", `{containers: [{name: main, image: IMAGE, volumeMounts: [{name: config, mountPath: /config}]}], volumes: [{name: config, configMap: {name: absent}}]}`,
		[]string{`Reason: +ContainerCreating`, `MountVolume\.SetUp failed for volume "config" : configmap "absent" not found`},
	},
	{
		"volume-misfit", `{containers: [{name: main, image: IMAGE, volumeMounts: [{name: disk, mountPath: /disk}]}], volumes: [{name: disk, hostPath: {path: /etc/passwd, type: Directory}}]}`,
		[]string{`MountVolume\.SetUp failed for volume "disk" : hostPath type check failed: /etc/passwd is not a directory`},
	},
	{
		"too-much", `containers: [{name: main, image: IMAGE, resources: {requests: {cpu: "1000", memory: 100Ti}}}]`,
		[]string{`FailedScheduling`, `0/2 nodes are available: .*Insufficient cpu`, `Insufficient memory`},
	},
	{
		"nowhere", `{nodeSelector: {disk: fast}, containers: [{name: main, image: IMAGE}]}`,
		[]string{`FailedScheduling`, `0/2 nodes are available: 2 node\(s\) didn't match Pod's node affinity/selector`},
	},
}

// faults applies what cannot work, all at once: each is told by its name, and the page goes on.
func (s story) faults() {
	l := startLoad(s.t, s.entrances()...)
	var names []string
	for _, bad := range hopelessPods {
		spec := bad.spec
		if !strings.HasPrefix(spec, "{") {
			spec = "{" + spec + "}"
		}
		must(s.t, s.c.Apply(s.t.Context(), fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec: %s\n", bad.name, strings.ReplaceAll(spec, "IMAGE", testimages.Busybox))))
		names = append(names, bad.name)
	}
	for _, bad := range hopelessPods {
		s.eventually(long, "kubectl describe tells the cause of "+bad.name, func(ctx context.Context) error {
			out, err := s.c.Kubectl(ctx, "describe", "pod", bad.name)
			if err != nil {
				return err
			}
			for _, want := range bad.says {
				if !regexp.MustCompile(want).MatchString(out) {
					return fmt.Errorf("it does not say %s:\n%s", want, out)
				}
			}
			return nil
		})
	}
	s.kubectl(append([]string{"delete", "pod", "--wait=false"}, names...)...)
	l.end(s.t)
}
