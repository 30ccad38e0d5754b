package proxy

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A namespace with what kube-proxy leaves there, in two modes, beside what is the kubelet's and somebody else's.
func TestCleanupInANamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, program := range []string{"nft", "iptables-nft-save"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	done := make(chan struct{})
	go func() { // its thread ends with it, and the namespace with that
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		cleanupHere(t)
	}()
	<-done
}

func cleanupHere(t *testing.T) {
	run := func(stdin string, args ...string) string {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%q: %v: %s", args, err, out)
		}
		return string(out)
	}
	run("table ip kube-proxy { chain a { } ; chain b { jump a ; } ; }\ntable ip6 kube-proxy { }\ntable ip other { }\n", "nft", "-f", "-")
	run("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n"+
		"-A PREROUTING -m comment --comment \"service portals\" -j KUBE-SERVICES\n-A PREROUTING -d 10.9.9.9 -j ACCEPT\n"+
		"-A KUBE-SERVICES -d 10.0.0.1/32 -j KUBE-SVC-A\nCOMMIT\n", "iptables-nft-restore")
	removed, err := Cleanup()
	if err != nil {
		t.Error(err)
	}
	if got := strings.Join(removed, "; "); !strings.Contains(got, "table ip kube-proxy; table ip6 kube-proxy") || !strings.Contains(got, "2 chains of iptables-nft in table nat") {
		t.Errorf("removed %s", got)
	}
	left := run("", "nft", "list", "ruleset")
	if strings.Contains(left, "kube-proxy") || strings.Contains(left, "KUBE-S") || !strings.Contains(left, "table ip other") ||
		!strings.Contains(left, "KUBE-KUBELET-CANARY") || !strings.Contains(left, "10.9.9.9") {
		t.Error(left)
	}
	if removed, err := Cleanup(); err != nil || len(removed) != 0 {
		t.Errorf("again: %v %v", removed, err)
	}
}
