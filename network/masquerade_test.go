package network

import (
	"bytes"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// programsEnv is where a test finds programs that the node is not to have.
const programsEnv = "BERTH_TEST_PROGRAMS"

// A firewall that is loaded anew flushes all rules, or those of NAT, and with them those that masquerade pods: their packets went out
// with their own addresses from then on, and no answer came. Of a pod that is gone nothing is made again.
func TestMasqueradeComesBack(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	const (
		port           = 8080
		range4, range6 = "10.89.9.0/24", "fd89:9::/64"
	)
	flushes := []string{"nft flush ruleset", "iptables -t nat -F", "ip6tables -t nat -F"}
	for name, tc := range map[string]struct {
		path    string // where programs are found
		flushes []string
	}{
		"iptables": {"", flushes},
		"nftables": {"/nonexistent", []string{"nft flush ruleset", "nft delete table inet cni_plugins_masquerade", "nft flush chain inet cni_plugins_masquerade masq_checks"}},
	} {
		t.Run(name, func(t *testing.T) {
			if all := os.Getenv(programsEnv); all != "" {
				t.Setenv("PATH", all)
			}
			var commands [][]string
			for _, f := range tc.flushes {
				words := strings.Fields(f)
				program, err := exec.LookPath(words[0])
				if err != nil {
					t.Skipf("needs %s", words[0])
				}
				commands = append(commands, append([]string{program}, words[1:]...))
			}
			nft, err := exec.LookPath("nft")
			if err != nil {
				t.Skip("needs nft")
			}
			if os.Getenv(programsEnv) != "" {
				t.Setenv("PATH", tc.path)
			}
			if tc.path != "" && os.Getenv("PATH") != tc.path { // what programs there are is remembered for a while
				child := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run=^TestMasqueradeComesBack$/^"+name+"$")
				child.Env = append(os.Environ(), "PATH="+tc.path, programsEnv+"="+os.Getenv("PATH"))
				if out, err := child.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestMasqueradeComesBack/"+name)) {
					t.Fatalf("%v: %s", err, out)
				}
				return
			}
			host, outside := wired(t, 1400)
			run := func(args ...string) (text string) {
				host.do(func() error {
					out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
					if err != nil {
						t.Errorf("%v: %v: %s", args, err, out)
					}
					text = string(out)
					return nil
				})
				return text
			}
			n := newNode(t)
			n.bin = bin
			m := n.open()
			if err := m.Close(); err != nil { // the watch would look at this machine's rules
				t.Fatal(err)
			}
			look := func() {
				host.do(func() error { m.keepMasqueraded(); return nil })
			}
			pods := []Pod{n.pod(), n.pod()}
			pods[1].ID = otherID
			host.do(func() (err error) {
				m.SetPodCIDRs(range4 + "," + range6)
				for i := range pods {
					if pods[i].Conflist, err = m.Conflist(); err != nil {
						return err
					}
					if _, err = m.Setup(t.Context(), pods[i]); err != nil {
						return err
					}
				}
				return nil
			})
			serve(t, outside.ns, port)
			masqueraded := func(when string) {
				t.Helper()
				for i, p := range pods {
					for to, from := range map[string]string{"192.168.99.2": "192.168.99.1", "fd99::2": "fd99::1"} {
						if got, err := ask(p.NetNS, to, port); err != nil || got != from {
							t.Errorf("%s: pod %d to %s: seen as %q, %v", when, i, to, got, err)
						}
					}
				}
			}
			masqueraded("at first")
			before := run(nft, "--stateless", "list", "ruleset")
			look()
			if after := run(nft, "--stateless", "list", "ruleset"); after != before {
				t.Errorf("nothing was missing, and rules have changed: %s\nbefore: %s", after, before)
			}
			for i, c := range commands {
				run(c...)
				look()
				masqueraded(strings.Join(c, " "))
				if log := n.daemonLog.String(); strings.Count(log, "were taken away by somebody else") != i+1 {
					t.Errorf("log: %s", log)
				}
			}
			once := run(nft, "--stateless", "list", "ruleset")
			look()
			if twice := run(nft, "--stateless", "list", "ruleset"); twice != once {
				t.Errorf("a second look has changed rules: %s\nbefore: %s", twice, once)
			}
			// Not while its plugins run, nor once it is gone.
			run(commands[0]...)
			_, done, err := m.alone(t.Context(), pods[0].ID)
			if err != nil {
				t.Fatal(err)
			}
			var again int
			host.do(func() (err error) {
				c, err := m.current()
				if err == nil {
					again, err = m.masqueradeAgain(c)
				}
				return err
			})
			if again != 1 {
				t.Errorf("rules of %d pods are made beside a plugin of one of two", again)
			}
			done()
			host.do(func() error { return m.Teardown(t.Context(), pods[0]) })
			pods = slices.Delete(pods, 0, 1)
			run(commands[0]...)
			look()
			masqueraded("after another pod is gone")
			host.do(func() error { return m.Teardown(t.Context(), pods[0]) })
			look()
			if left := run(nft, "--stateless", "list", "ruleset"); strings.Contains(left, "10.89.9.") || strings.Contains(left, "fd89:9::") {
				t.Errorf("left: %s", left)
			}
		})
	}
}
