package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A client asks a Service, and the pod that answers is on the same bridge: also where the machine has its bridges pass netfilter by, or no
// br_netfilter (in `make test-vm`).
func TestServiceOfAPodOnTheSameBridge(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	const port, range4, range6 = 8080, "10.89.9.0/24", "fd89:9::/64"
	services := []string{"10.99.0.1", "fd99:9::1"}
	host := newLinks(t)
	n := newNode(t)
	n.bin = bin
	m := n.open()
	if err := m.Close(); err != nil { // the watch would look at this machine's bridges
		t.Fatal(err)
	}
	client, server := n.pod(), n.pod()
	server.ID = strings.Repeat("5", len(client.ID))
	host.do(func() error {
		for _, setting := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
			if err := os.WriteFile(bridgeSettings+"/"+setting, []byte("0"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) { // berth loads the module
				return err
			}
		}
		m.SetPodCIDRs(range4 + "," + range6)
		rules := "table inet services {\nchain pre {\ntype nat hook prerouting priority dstnat\n"
		for _, p := range []*Pod{&client, &server} {
			var err error
			if p.Conflist, err = m.Conflist(); err != nil {
				return err
			}
			res, err := m.Setup(t.Context(), *p)
			if err != nil {
				return err
			}
			if p == &server {
				rules += fmt.Sprintf("ip daddr %s dnat ip to %s\nip6 daddr %s dnat ip6 to %s\n", services[0], res.IPs[0], services[1], res.IPs[1])
			}
		}
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules + "}\n}\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	serve(t, server.NetNS, port)
	for _, service := range services {
		if got, err := ask(client.NetNS, service, port); err != nil {
			t.Errorf("%s: %q, %v", service, got, err)
		}
	}
	host.do(func() error {
		for _, p := range []Pod{client, server} {
			if err := m.Teardown(t.Context(), p); err != nil {
				return err
			}
		}
		return nil
	})
	if log := n.daemonLog.String(); strings.Contains(log, "netfilter") {
		t.Errorf("log: %s", log)
	}
}
