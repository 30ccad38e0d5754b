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

// Beside a kube-proxy that has taken the chains over, berth's own alone go, and those only when nothing leads there any more; of chains
// that nothing leads to, all go.
func TestRemovalOfOwn(t *testing.T) {
	own := func(text string) string {
		t.Helper()
		have, err := parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return removalOfOwn(have, filter).String()
	}
	const chains = "*filter\n:FORWARD ACCEPT [0:0]\n:KUBE-CLUSTER-IPS - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-REJECT - [0:0]\n:KUBE-SERVICES - [0:0]\n" +
		"-A KUBE-CLUSTER-IPS -j KUBE-EXTERNAL-SERVICES\n-A KUBE-CLUSTER-IPS -d 10.96.0.1/32 -j KUBE-REJECT\n"
	const jump, use = "-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n", "-A KUBE-SERVICES -d 10.96.0.0/12 -j KUBE-CLUSTER-IPS\n"
	for name, tc := range map[string]struct{ text, want string }{
		"kube-proxy's": {chains + jump + "COMMIT\n", "*filter\n:KUBE-CLUSTER-IPS - [0:0]\n:KUBE-REJECT - [0:0]\n-X KUBE-CLUSTER-IPS\n-X KUBE-REJECT\nCOMMIT\n"},
		"berth's":      {chains + jump + use + "COMMIT\n", ""},
		"nobody's": {chains + use + "COMMIT\n", "*filter\n:KUBE-CLUSTER-IPS - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-REJECT - [0:0]\n:KUBE-SERVICES - [0:0]\n" +
			"-X KUBE-CLUSTER-IPS\n-X KUBE-EXTERNAL-SERVICES\n-X KUBE-REJECT\n-X KUBE-SERVICES\nCOMMIT\n"},
	} {
		if got := own(tc.text); got != tc.want {
			t.Errorf("%s:\n%s", name, got)
		}
	}
}
