package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tools are the real peers, as integration/tools/build.sh made them.
type Tools struct {
	Kubelet, Crictl, Critest, Registry, Busybox string // programs
	APIServer, KubeProxy, Kubectl, Etcd         string // programs
	Scheduler, ControllerManager                string // programs
	CNI                                         string // directory of the reference plugins
	Containerd                                  string // directory of containerd, containerd-shim-runc-v2 and runc
	Ctr                                         string // program
	KubeProxyTests                              string // directory of the test programs nftables and proxy
	E2E                                         string // directory of e2e.test, ginkgo and agnhost
	MetricsServer                               string // directory of metrics-server and its manifests
	DNS, Traefik                                string // programs: CoreDNS, an ingress controller
	Kubeadm, SampleAPIServer                    string // programs
}

// BuildTools builds the named tools (all when none is named) unless an earlier run did. Progress goes to the writer.
func BuildTools(ctx context.Context, progress io.Writer, names ...string) (*Tools, error) {
	root, err := RepoRoot()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "integration/tools/build.sh"), names...)
	cmd.Stderr = progress
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("integration/tools/build.sh: %w", err)
	}
	var t Tools
	into := map[string]*string{
		"kubelet": &t.Kubelet, "crictl": &t.Crictl, "critest": &t.Critest, "registry": &t.Registry, "busybox": &t.Busybox,
		"cni": &t.CNI, "containerd": &t.Containerd, "kube-apiserver": &t.APIServer, "kube-proxy": &t.KubeProxy, "kubectl": &t.Kubectl, "etcd": &t.Etcd, "ctr": &t.Ctr,
		"kubeproxy-tests": &t.KubeProxyTests, "e2e": &t.E2E, "dns": &t.DNS, "traefik": &t.Traefik, "metrics-server": &t.MetricsServer, "kube-scheduler": &t.Scheduler, "kube-controller-manager": &t.ControllerManager, "kubeadm": &t.Kubeadm,
		"sample-apiserver": &t.SampleAPIServer,
	}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		name, path, ok := strings.Cut(lines.Text(), " ")
		if !ok || into[name] == nil {
			return nil, fmt.Errorf("integration/tools/build.sh: unexpected line %q", lines.Text())
		}
		*into[name] = path
	}
	return &t, lines.Err()
}

// RepoRoot is the directory of this repository, found from the working directory upwards.
func RepoRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for start := dir; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		switch {
		case err == nil && bytes.HasPrefix(text, []byte("module github.com/berth-run/berth\n")):
			return dir, nil
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return "", err
		case dir == "/":
			return "", fmt.Errorf("%s is in no clone of berth", start)
		}
	}
}

// cacheDir is where results that all clones on the machine share are kept; build.sh uses the same.
func cacheDir() (string, error) {
	if dir := os.Getenv("BERTH_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("set BERTH_CACHE: %w", err)
	}
	return filepath.Join(dir, "berth"), nil
}
