package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ControlPlane is etcd and an API server: no scheduler and no controllers, so that pods name their node, and run as soon as
// that node's kubelet sees them. Everything listens on a loopback address of its own, which makes fixed ports safe.
type ControlPlane struct {
	Dir        string // everything of it lies below
	Kubeconfig string // with all rights

	address string
	token   string
	tools   *Tools
	claim   net.Listener
	client  *http.Client

	etcd, apiserver *Process
	extra           []string // arguments of the API server
}

// StartControlPlane starts etcd and the API server and waits until that is ready. Extra are more arguments of the API server.
func StartControlPlane(ctx context.Context, tools *Tools, extra ...string) (*ControlPlane, error) {
	if tools.APIServer == "" || tools.Etcd == "" || tools.Kubectl == "" {
		built, err := BuildTools(ctx, os.Stderr, "kube-apiserver", "etcd", "kubectl")
		if err != nil {
			return nil, err
		}
		tools.APIServer, tools.Etcd, tools.Kubectl = built.APIServer, built.Etcd, built.Kubectl
	}
	cp := &ControlPlane{
		token: random() + random(), tools: tools,
		client: &http.Client{Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{InsecureSkipVerify: true}, // its own certificate, on loopback
			MaxIdleConnsPerHost: 16,
		}},
	}
	if err := cp.claimAddress(); err != nil {
		return nil, err
	}
	var err error
	if cp.Dir, err = os.MkdirTemp("", "berth-lab-cp-"); err != nil {
		return nil, errors.Join(err, cp.claim.Close())
	}
	cp.Kubeconfig = filepath.Join(cp.Dir, "kubeconfig")
	if err = cp.files(); err == nil {
		cp.extra = extra
		err = cp.start(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the control plane: %w", err), cp.Close())
	}
	return cp, nil
}

// claimAddress takes the lowest free address of 127.92.0.0/16, in the way of Node.claimIndex.
func (cp *ControlPlane) claimAddress() error {
	for i := 1; i <= 200; i++ {
		l, err := net.Listen("unix", fmt.Sprintf("@berth-lab-cp-%d", i))
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return err
		}
		cp.claim, cp.address = l, fmt.Sprintf("127.92.%d.1", i)
		return nil
	}
	return errors.New("200 control planes live on this machine")
}

// files are what the API server reads: a token for everything, and the key it signs service accounts' tokens with.
func (cp *ControlPlane) files() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"sa.key":     string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})),
		"tokens.csv": cp.token + ",admin,admin,system:masters\n",
		"kubeconfig": fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: %q}}]
contexts: [{name: lab, context: {cluster: lab, user: admin}}]
current-context: lab
`, cp.url(""), cp.token),
	} {
		if err := os.WriteFile(filepath.Join(cp.Dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (cp *ControlPlane) url(path string) string { return "https://" + cp.address + ":6443" + path }

func (cp *ControlPlane) store() string { return "http://" + cp.address + ":2379" }

// Address is where the API server listens, HOST:PORT.
func (cp *ControlPlane) Address() string { return cp.address + ":6443" }

func (cp *ControlPlane) start(ctx context.Context) error {
	store, peer := cp.store(), "http://"+cp.address+":2380"
	var err error
	cp.etcd, err = start("etcd", filepath.Join(cp.Dir, "etcd.log"), nil, cp.tools.Etcd,
		"--data-dir", filepath.Join(cp.Dir, "etcd"), "--listen-client-urls", store, "--advertise-client-urls", store,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer,
		"--unsafe-no-fsync", "--log-level", "warn") // its data goes with the test
	if err != nil {
		return err
	}
	return cp.StartAPIServer(ctx)
}

// KillAPIServer ends the API server with SIGKILL. What it has stored stays in etcd.
func (cp *ControlPlane) KillAPIServer() error {
	cp.client.CloseIdleConnections()
	return cp.apiserver.Kill()
}

// StartAPIServer starts the API server, also one that was killed, and waits until it is ready.
func (cp *ControlPlane) StartAPIServer(ctx context.Context) (err error) {
	in := func(name string) string { return filepath.Join(cp.Dir, name) }
	args := append([]string{
		"--etcd-servers", cp.store(), "--bind-address", cp.address, "--secure-port", "6443", "--cert-dir", in("pki"),
		"--advertise-address", cp.address, "--endpoint-reconciler-type", "none",
		"--service-cluster-ip-range", "10.93.0.0/24", "--service-account-issuer", "https://lab.invalid",
		"--service-account-key-file", in("sa.key"), "--service-account-signing-key-file", in("sa.key"),
		"--token-auth-file", in("tokens.csv"), "--anonymous-auth=false",
		// Without controllers no namespace gets its default service account.
		"--disable-admission-plugins", "ServiceAccount", "--kubelet-preferred-address-types", "InternalIP",
		"--allow-privileged=true", "--profiling=false",
	}, cp.extra...)
	if !slices.ContainsFunc(cp.extra, func(arg string) bool { return strings.HasPrefix(arg, "--authorization-mode") }) {
		args = append(args, "--authorization-mode=AlwaysAllow")
	}
	if cp.apiserver, err = start("kube-apiserver", in("kube-apiserver.log"), nil, cp.tools.APIServer, args...); err != nil {
		return err
	}
	return cp.apiserver.ready(ctx, 3*time.Minute, func(ctx context.Context) error {
		if !cp.etcd.Alive() {
			return fmt.Errorf("etcd ended: %s", cp.etcd.Tail(5))
		}
		if _, err := cp.Get(ctx, "/readyz"); err != nil {
			return err
		}
		_, err := cp.Get(ctx, "/api/v1/namespaces/default") // made a moment later
		return err
	})
}

// StartEmpty ends both programs, and starts them again with nothing of what was stored: the control plane of a cluster whose etcd was
// lost. Revisions begin anew.
func (cp *ControlPlane) StartEmpty(ctx context.Context) error {
	if err := errors.Join(cp.KillAPIServer(), cp.etcd.Kill(), os.RemoveAll(filepath.Join(cp.Dir, "etcd"))); err != nil {
		return err
	}
	return cp.start(ctx)
}

// Close ends both programs and removes their files. Nothing of what they stored is wanted: they are killed.
func (cp *ControlPlane) Close() error {
	cp.client.CloseIdleConnections()
	var errs []error
	for _, p := range []*Process{cp.apiserver, cp.etcd} {
		if p != nil {
			errs = append(errs, p.Kill())
		}
	}
	if os.Getenv("BERTH_KEEP") == "" {
		errs = append(errs, os.RemoveAll(cp.Dir))
	}
	return errors.Join(append(errs, cp.claim.Close())...)
}

// Complaints are the last errors in the API server's log.
func (cp *ControlPlane) Complaints() string {
	text, err := os.ReadFile(cp.apiserver.Log)
	if err != nil {
		return err.Error()
	}
	var lines []string
	for _, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(line, "E") || strings.HasPrefix(line, "F") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}
