package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// startControlPlane starts etcd, API server, scheduler and controller manager; each is waited for, but the last two together.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	pki := func(name string) string { return c.path("pki", name) }
	lo := c.loopback()
	store, peer := "https://"+lo+":2379", "https://"+lo+":2380"
	etcd, err := c.startHere("etcd",
		"--data-dir", c.path("etcd"), "--listen-client-urls", store, "--advertise-client-urls", store,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer,
		"--cert-file", pki("etcd.crt"), "--key-file", pki("etcd.key"), "--client-cert-auth", "--trusted-ca-file", pki("etcd-ca.crt"),
		"--peer-cert-file", pki("etcd.crt"), "--peer-key-file", pki("etcd.key"), "--peer-client-cert-auth", "--peer-trusted-ca-file", pki("etcd-ca.crt"),
		"--listen-metrics-urls", "http://"+lo+":2381", "--unsafe-no-fsync", "--log-level", "warn")
	if err != nil {
		return err
	}
	if err := etcd.ready(ctx, time.Minute, healthy("http://"+lo+":2381/health", nil)); err != nil {
		return err
	}
	c.logf("etcd is ready")
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	c.logf("kube-apiserver is ready: %s", c.server())
	if err := c.Apply(ctx, kubeletClients); err != nil {
		return err
	}
	return c.startControllers(ctx)
}

// kubeletClients are the rights of the API server at kubelets.
const kubeletClients = `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: berth-cluster:kubelet-clients}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:kubelet-api-admin}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: berth-cluster:kubelet-clients}]
`

// StartAPIServer starts the API server, and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	pki := func(name string) string { return c.path("pki", name) }
	p, err := c.startHere("kube-apiserver",
		"--etcd-servers", "https://"+c.loopback()+":2379", "--etcd-cafile", pki("etcd-ca.crt"), "--etcd-certfile", pki("apiserver-etcd-client.crt"), "--etcd-keyfile", pki("apiserver-etcd-client.key"),
		"--bind-address", c.HostAddress(), "--advertise-address", c.HostAddress(), "--secure-port", "6443",
		"--tls-cert-file", pki("apiserver.crt"), "--tls-private-key-file", pki("apiserver.key"), "--client-ca-file", pki("ca.crt"),
		"--kubelet-client-certificate", pki("apiserver-kubelet-client.crt"), "--kubelet-client-key", pki("apiserver-kubelet-client.key"),
		"--kubelet-certificate-authority", pki("ca.crt"), "--kubelet-preferred-address-types", "InternalIP",
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--enable-bootstrap-token-auth",
		"--service-cluster-ip-range", c.ServiceCIDR(), "--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file", pki("sa.key"), "--service-account-signing-key-file", pki("sa.key"),
		"--requestheader-client-ca-file", pki("front-proxy-ca.crt"), "--requestheader-allowed-names", "front-proxy-client",
		"--requestheader-extra-headers-prefix", "X-Remote-Extra-", "--requestheader-group-headers", "X-Remote-Group", "--requestheader-username-headers", "X-Remote-User",
		"--proxy-client-cert-file", pki("front-proxy-client.crt"), "--proxy-client-key-file", pki("front-proxy-client.key"),
		"--enable-aggregator-routing", "--allow-privileged")
	if err != nil {
		return err
	}
	return p.ready(ctx, 3*time.Minute, func(ctx context.Context) error {
		_, err := c.Kubectl(ctx, "get", "--raw", "/readyz")
		return err
	})
}

func (c *Cluster) startControllers(ctx context.Context) error {
	pki := func(name string) string { return c.path("pki", name) }
	lo := c.loopback()
	var started []*process
	common := func(name string) []string {
		config := c.path(name + ".kubeconfig")
		return []string{
			"--kubeconfig", config, "--authentication-kubeconfig", config, "--authorization-kubeconfig", config, "--leader-elect=false",
			"--bind-address", lo, "--tls-cert-file", pki(name + ".crt"), "--tls-private-key-file", pki(name + ".key"),
		}
	}
	for name, more := range map[string][]string{
		"kube-scheduler": nil,
		"kube-controller-manager": {
			"--controllers", "*,bootstrapsigner,tokencleaner", "--use-service-account-credentials",
			"--root-ca-file", pki("ca.crt"), "--cluster-signing-cert-file", pki("ca.crt"), "--cluster-signing-key-file", pki("ca.key"),
			"--service-account-private-key-file", pki("sa.key"), "--requestheader-client-ca-file", pki("front-proxy-ca.crt"),
			"--allocate-node-cidrs", "--cluster-cidr", c.PodCIDR(), "--service-cluster-ip-range", c.ServiceCIDR(), "--cluster-name", "berth-cluster",
		},
	} {
		p, err := c.startHere(name, append(common(name), more...)...)
		if err != nil {
			return err
		}
		started = append(started, p)
	}
	ports := map[string]int{"kube-scheduler": 10259, "kube-controller-manager": 10257}
	trust, err := c.trust()
	if err != nil {
		return err
	}
	for _, p := range started {
		if err := p.ready(ctx, time.Minute, healthy(fmt.Sprintf("https://%s:%d/healthz", lo, ports[p.name]), trust)); err != nil {
			return err
		}
		c.logf("%s is ready", p.name)
	}
	return nil
}

// trust believes what the cluster's authority has signed.
func (c *Cluster) trust() (*tls.Config, error) {
	text, err := os.ReadFile(c.path("pki", "ca.crt"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate", c.path("pki", "ca.crt"))
	}
	return &tls.Config{RootCAs: pool}, nil
}

// healthy asks a URL until it answers 200.
func healthy(url string, trust *tls.Config) func(context.Context) error {
	return healthyOn(url, &http.Transport{TLSClientConfig: trust, DisableKeepAlives: true})
}

func healthyOn(url string, transport *http.Transport) func(context.Context) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: transport}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusOK {
			text, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // for the message alone
			return fmt.Errorf("%s: %s %s", url, resp.Status, text)
		}
		return nil
	}
}

// startHere starts a program of the control plane, on this machine itself.
func (c *Cluster) startHere(name string, args ...string) (*process, error) {
	return c.start(name, c.cgroup()+"/control-plane", c.path("logs", name+".log"), nil, nil, c.program(name), append(args, c.moreArgs[name]...)...)
}
