//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
)

var recordVersionLine = regexp.MustCompile(`(?m)^\trecordVersion = (\d+)$`)

// laterBerth builds berth as it is here, but with the next version of records. That version is the result, too.
func laterBerth(t *testing.T) (program string, version int) {
	t.Helper()
	root, err := lab.RepoRoot()
	must(t, err)
	dir := t.TempDir()
	source := filepath.Join(root, "cri/pods/format.go")
	text, err := os.ReadFile(source)
	must(t, err)
	found := recordVersionLine.FindAllSubmatch(text, -1)
	if len(found) != 1 {
		t.Fatalf("%s says %d times what recordVersion is", source, len(found))
	}
	version, err = strconv.Atoi(string(found[0][1]))
	must(t, err)
	version++
	changed, overlay, program := filepath.Join(dir, "format.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "berth")
	must(t, os.WriteFile(changed, recordVersionLine.ReplaceAll(text, fmt.Appendf(nil, "\trecordVersion = %d", version)), 0o600))
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{source: changed}})
	must(t, err)
	must(t, os.WriteFile(overlay, replace, 0o600))
	began := time.Now()
	build := exec.CommandContext(t.Context(), "go", "build", "-overlay", overlay, "-trimpath", "-tags", "nri_no_wasm",
		"-ldflags", "-s -w -X github.com/berth-run/berth/internal/version.Version="+laterVersion, "-o", program, "./cmd/berth")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", build.Args, err, out)
	}
	t.Logf("berth %s with records of version %d is built in %.1f s", laterVersion, version, time.Since(began).Seconds())
	return program, version
}

const laterVersion = "99.0.0-later"

// podRecord is what berth keeps of a pod.
type podRecord struct {
	Version, Reader int
	Handler         string
	Steps           []string
	Config          struct{ Metadata struct{ UID string } }
}

// records are those of a node's pods, by the pods' UIDs.
func (s story) records(n *cluster.Node) map[string]podRecord {
	s.t.Helper()
	out, err := n.Command(s.t.Context(), "sh", "-c", "cat /var/lib/berth/pods/*.json").Output()
	must(s.t, err)
	by := map[string]podRecord{}
	for decoder := json.NewDecoder(strings.NewReader(string(out))); decoder.More(); {
		var rec podRecord
		must(s.t, decoder.Decode(&rec))
		by[rec.Config.Metadata.UID] = rec
	}
	return by
}

// upgradeBerth goes to a later berth and back on each node, with pods of before, and pods that the later one has made.
func (s story) upgradeBerth() {
	program, version := laterBerth(s.t)
	today := filepath.Join(s.t.TempDir(), "berth")
	text, err := os.ReadFile(s.c.Program("berth"))
	must(s.t, err)
	must(s.t, os.WriteFile(today, text, 0o755))
	lives := s.lives("web", "shell")
	l := s.underLoad()

	must(s.t, s.c.Install("berth", program))
	for _, n := range s.c.Nodes {
		s.restartBerth(n, syscall.SIGTERM)
		s.runs(n, laterVersion)
	}
	s.liveOn(lives)
	must(s.t, s.c.Apply(s.t.Context(), strings.ReplaceAll(shellManifest, "shell", "later")))
	s.ready("later", 2, long, onNodes("node-1", "node-2"))
	made := s.lives("later")
	noted := 0
	for _, n := range s.c.Nodes {
		for uid, rec := range s.records(n) {
			if _, ok := made[uid]; !ok {
				continue
			}
			noted++
			if rec.Version != version {
				s.t.Errorf("%s: the record of a pod that the later berth has made is of version %d", n.Name, rec.Version)
			}
		}
	}
	if noted != len(made) {
		s.t.Errorf("%d of %d pods of the later berth are on record", noted, len(made))
	}
	maps.Copy(lives, made)

	must(s.t, s.c.Install("berth", today))
	for _, n := range s.c.Nodes {
		before := s.records(n)
		s.restartBerth(n, syscall.SIGKILL)
		s.eventually(long, n.Name+" runs the former berth", func(ctx context.Context) error {
			if out, err := s.runtimeVersion(ctx, n); err != nil || strings.Contains(out, laterVersion) {
				return errors.Join(err, errors.New(out))
			}
			return nil
		})
		for uid, rec := range s.records(n) {
			if was, ok := before[uid]; ok && (rec.Handler != was.Handler || rec.Version < was.Version || len(rec.Steps) != len(was.Steps)) {
				s.t.Errorf("%s: the record of pod %s was %+v, and is %+v", n.Name, uid, was, rec)
			}
		}
	}
	s.liveOn(lives)
	l.end(s.t)
	s.kubectl("delete", "daemonset", "later") // what the later one has made the former one ends, and has removed at the story's end
	s.count("later", 0)
}

func (s story) runtimeVersion(ctx context.Context, n *cluster.Node) (string, error) {
	return s.c.Kubectl(ctx, "get", "node", n.Name, "-o", "jsonpath={.status.nodeInfo.containerRuntimeVersion}")
}

func (s story) runs(n *cluster.Node, version string) {
	s.t.Helper()
	s.eventually(long, n.Name+" runs berth "+version, func(ctx context.Context) error {
		out, err := s.runtimeVersion(ctx, n)
		if err == nil && !strings.HasSuffix(out, version) {
			err = errors.New(out)
		}
		return err
	})
}

// lives are the containers of applications, by the UIDs of their pods.
func (s story) lives(apps ...string) map[string]string {
	s.t.Helper()
	lives := map[string]string{}
	for _, app := range apps {
		for _, p := range s.ready(app, 2, long, nil) {
			lives[p.Metadata.UID] = p.lives()
		}
	}
	return lives
}

func (p clusterPodStatus) lives() string {
	var all []string
	for _, c := range p.Status.ContainerStatuses {
		all = append(all, fmt.Sprintf("%s restarted %d times", c.ContainerID, c.RestartCount))
	}
	return strings.Join(all, ", ")
}

// liveOn asks whether containers are the same, also for who runs something in them.
func (s story) liveOn(want map[string]string) {
	s.t.Helper()
	var list struct{ Items []clusterPodStatus }
	must(s.t, json.Unmarshal([]byte(s.kubectl("get", "pods", "-o", "json")), &list))
	found := 0
	for _, p := range list.Items {
		was, ok := want[p.Metadata.UID]
		if !ok {
			continue
		}
		found++
		if was != p.lives() {
			s.t.Errorf("%s had %s, and has %s", p.Metadata.Name, was, p.lives())
		}
		command := []string{"exec", p.Metadata.Name, "--", "true"}
		if strings.HasPrefix(p.Metadata.Name, "web-") { // which has no shell
			command = []string{"exec", p.Metadata.Name, "-c", "web", "--", "/bin/app", "-help"}
		}
		s.eventually(long, "exec in "+p.Metadata.Name, func(ctx context.Context) error {
			_, err := s.c.Kubectl(ctx, command...)
			return err
		})
	}
	if found != len(want) {
		s.t.Errorf("%d of %d pods are there", found, len(want))
	}
}
