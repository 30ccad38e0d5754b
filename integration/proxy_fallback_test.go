//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
)

// withoutNetfilterEnv has the test program run another one, which gets no socket of NETLINK_NETFILTER, as on a kernel without it.
const withoutNetfilterEnv = "BERTH_TEST_WITHOUT_NETFILTER"

func init() {
	if os.Getenv(withoutNetfilterEnv) != "" {
		fmt.Fprintln(os.Stderr, withoutNetfilter(os.Args[1], os.Args[1:]))
		os.Exit(1)
	}
}

// withoutNetfilter becomes a program under such a filter.
func withoutNetfilter(program string, args []string) error {
	runtime.LockOSThread()
	// struct seccomp_data has the call's number first, and its arguments, of eight bytes each, from 16 on.
	const number, argument0, argument2 = 0, 16, 32
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	unless := func(v uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: v, Jf: skip}
	}
	answer := func(v uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: v} }
	filter := []unix.SockFilter{
		load(number), unless(unix.SYS_SOCKET, 5),
		load(argument0), unless(unix.AF_NETLINK, 3),
		load(argument2), unless(unix.NETLINK_NETFILTER, 1),
		answer(unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)),
		answer(unix.SECCOMP_RET_ALLOW),
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if err := os.Unsetenv(withoutNetfilterEnv); err != nil {
		return err
	}
	return unix.Exec(program, args, os.Environ())
}

// TestProxyWithoutNFTables has a proxy whose kernel does not answer for nf_tables: without a mode it says why it goes on with iptables, and
// Services are reached by iptables-legacy. A filter of system calls takes the kernel's answers away; integration/vm/proxy.sh has a kernel
// that cannot load nf_tables, where an API server takes too long.
func TestProxyWithoutNFTables(t *testing.T) {
	cp, err := lab.StartControlPlane(t.Context(), tools)
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	n := newProxyNode(t, cp, "node-1")
	createService(t, cp, "web", "10.93.0.50", "")
	createService(t, cp, "empty", "10.93.0.51", "")
	createSlice(t, cp, "web", endpointA)

	// A host whose iptables is legacy.
	programs := filepath.Join(n.dir, "programs")
	must(t, os.Mkdir(programs, 0o755))
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, kind := range []string{"", "-save", "-restore"} {
			legacy, err := exec.LookPath(name + "-legacy" + kind)
			must(t, err)
			must(t, os.Symlink(legacy, filepath.Join(programs, name+kind)))
		}
	}
	root, err := lab.RepoRoot()
	must(t, err)
	log := filepath.Join(n.dir, "proxy.log")
	self, err := os.Executable()
	must(t, err)
	n.proxy, err = lab.StartIn(n.netns, n.name, log, []string{"PATH=" + programs + ":" + os.Getenv("PATH"), withoutNetfilterEnv + "=1"}, self, filepath.Join(root, "bin/berth"), "proxy",
		"--kubeconfig", cp.Kubeconfig, "--hostname-override", n.name, "--cluster-cidr", "10.88.0.0/16", "--conntrack-max-per-core", "0", "--conntrack-min", "0")
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", n.proxy.Tail(20))
		}
		must(t, n.proxy.Kill())
	})
	said := func(text string) {
		t.Helper()
		must(t, lab.Eventually(t.Context(), soon, "the proxy says "+text, func(context.Context) error {
			all, err := os.ReadFile(log)
			if err == nil && !strings.Contains(string(all), text) {
				err = fmt.Errorf("%s", all)
			}
			return err
		}))
	}
	said("the kernel's nf_tables cannot do what is needed, and no mode is configured: it is iptables")
	said("protocol not supported") // and so why
	said("mode=iptables")
	said("Services are programmed")
	answers := func(want string) {
		t.Helper()
		must(t, lab.Eventually(t.Context(), soon, "the Service answers as "+want, func(context.Context) error {
			return n.in(func() error {
				if got := askClusterIP(netip.MustParseAddr("10.93.0.50")); got != want {
					return fmt.Errorf("%q", got)
				}
				return nil
			})
		}))
	}
	answers(endpointA)
	_, err = cp.Do(t.Context(), http.MethodPatch, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/web-1", "application/merge-patch+json",
		[]byte(`{"endpoints":[{"addresses":["`+endpointB+`"],"conditions":{"ready":true}}]}`))
	must(t, err)
	answers(endpointB)
	if tables := script(t, n.netns, "nft list tables"); tables != "" {
		t.Errorf("nft list tables: %s", tables)
	}
	if rules := script(t, n.netns, "iptables-legacy-save"); !strings.Contains(rules, "-d 10.93.0.50/32") || !strings.Contains(rules, "default/empty has no endpoints") {
		t.Errorf("iptables-legacy-save:\n%s", rules)
	}
	must(t, n.proxy.Stop())
	must(t, n.in(func() error {
		_, err := lab.CleanProxy()
		out, err2 := exec.Command("iptables-legacy-save").CombinedOutput()
		if strings.Contains(string(out), "KUBE-SERVICES") {
			err2 = errors.Join(err2, fmt.Errorf("--cleanup leaves\n%s", out))
		}
		return errors.Join(err, err2)
	}))
}
