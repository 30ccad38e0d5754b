package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// authority signs certificates. Its key is needed later as well, for those that the API signs, and for nodes that are added.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // of its certificate
}

// newAuthority makes NAME.crt and NAME.key in a directory.
func newAuthority(dir, name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "berth-cluster-" + name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := sign(template, template, key, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, name)
	return &authority{cert, key, file + ".crt"}, writePair(file, der, key)
}

func sign(template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(10, 0, 0)
	return x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
}

// issue makes FILE.crt and FILE.key: for a client by its user and groups, for a server by the names and addresses that it has.
func (a *authority) issue(file, user string, groups []string, hosts ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: user, Organization: groups}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if len(hosts) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	der, err := sign(template, a.cert, key, a.key)
	if err != nil {
		return err
	}
	return writePair(file, der, key)
}

func writePair(file string, cert []byte, key *ecdsa.PrivateKey) error {
	if err := os.WriteFile(file+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644); err != nil {
		return err
	}
	return writeKey(file+".key", key)
}

func writeKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// certificates makes all that the cluster's parts show each other.
func (c *Cluster) certificates() error {
	dir := c.path("pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(dir, "ca")
	if err != nil {
		return err
	}
	// Who may speak for a front proxy may speak for anybody, and who may ask etcd may read all: neither is a matter of the cluster's
	// own authority.
	front, err := newAuthority(dir, "front-proxy-ca")
	if err != nil {
		return err
	}
	store, err := newAuthority(dir, "etcd-ca")
	if err != nil {
		return err
	}
	accounts, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if err := writeKey(filepath.Join(dir, "sa.key"), accounts); err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	service := fmt.Sprintf("10.%d.0.1", 120+c.Index)
	for _, p := range []struct {
		by     *authority
		file   string
		user   string
		groups []string
		hosts  []string
	}{
		{ca, "apiserver", "kube-apiserver", nil, []string{
			c.HostAddress(), service, "127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		}},
		{ca, "apiserver-kubelet-client", "kube-apiserver-kubelet-client", []string{"berth-cluster:kubelet-clients"}, nil},
		{ca, "kube-controller-manager", "system:kube-controller-manager", nil, []string{c.loopback(), "localhost"}},
		{ca, "kube-scheduler", "system:kube-scheduler", nil, []string{c.loopback(), "localhost"}},
		{ca, "kube-proxy", "system:kube-proxy", nil, nil},
		{ca, "admin", "berth-cluster-admin", []string{"system:masters"}, nil},
		{front, "front-proxy-client", "front-proxy-client", nil, nil},
		{store, "etcd", "etcd", nil, []string{c.loopback()}},
		{store, "apiserver-etcd-client", "kube-apiserver", nil, nil},
	} {
		if err := p.by.issue(in(p.file), p.user, p.groups, p.hosts...); err != nil {
			return fmt.Errorf("certificate %s: %w", p.file, err)
		}
	}
	for _, n := range c.Nodes {
		if err := ca.issue(in(n.Name), "system:node:"+n.Name, []string{"system:nodes"}); err != nil {
			return err
		}
		if err := ca.issue(in(n.Name+"-serving"), "system:node:"+n.Name, []string{"system:nodes"}, n.Name, n.Address()); err != nil {
			return err
		}
		if err := c.kubeconfig(n.path("kubelet.kubeconfig"), n.Name); err != nil {
			return err
		}
		if c.parts == Berth {
			continue
		}
		if err := c.kubeconfig(n.path("proxy.kubeconfig"), "kube-proxy"); err != nil {
			return err
		}
	}
	for file, cert := range map[string]string{
		c.Kubeconfig(): "admin", c.path("kube-controller-manager.kubeconfig"): "kube-controller-manager", c.path("kube-scheduler.kubeconfig"): "kube-scheduler",
	} {
		if err := c.kubeconfig(file, cert); err != nil {
			return err
		}
	}
	return nil
}

// kubeconfig writes one for who has a certificate. All is in the file itself: it may be copied away.
func (c *Cluster) kubeconfig(file, cert string) error {
	var data [3]string
	for i, name := range []string{"ca.crt", cert + ".crt", cert + ".key"} {
		text, err := os.ReadFile(c.path("pki", name))
		if err != nil {
			return err
		}
		data[i] = base64.StdEncoding.EncodeToString(text)
	}
	return c.writeKubeconfig(file, data[0], fmt.Sprintf("{client-certificate-data: %q, client-key-data: %q}", data[1], data[2]))
}

func (c *Cluster) writeKubeconfig(file, ca, user string) error {
	return os.WriteFile(file, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: berth-cluster, cluster: {server: %q, certificate-authority-data: %q}}]
users: [{name: user, user: %s}]
contexts: [{name: berth-cluster, context: {cluster: berth-cluster, user: user}}]
current-context: berth-cluster
`, c.server(), ca, user), 0o600)
}
