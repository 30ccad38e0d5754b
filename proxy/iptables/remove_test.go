package iptables

import "testing"

func removalOf(t *testing.T, text string) string {
	t.Helper()
	have, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return removal(have, nat).String()
}

// What iptables-restore is given takes kube-proxy's chains away, and nothing else.
func TestRemoval(t *testing.T) {
	const saved = `# Generated
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
:KUBE-SEP-DEF - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-FIREWALL - [0:0]
:CNI-KUBE-SVC - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals -j" -j KUBE-SERVICES
-A PREROUTING -j CNI-KUBE-SVC
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-SERVICES -d 10.0.0.1/32 -j KUBE-SVC-ABC
-A KUBE-SVC-ABC -j KUBE-SEP-DEF
COMMIT
`
	got := removalOf(t, saved)
	want := `*nat
:KUBE-SEP-DEF - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-D PREROUTING -m comment --comment "kubernetes service portals -j" -j KUBE-SERVICES
-X KUBE-SEP-DEF
-X KUBE-SERVICES
-X KUBE-SVC-ABC
COMMIT
`
	if got != want {
		t.Error(got)
	}
	if got := removalOf(t, "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n"); got != "" {
		t.Error(got)
	}
}
