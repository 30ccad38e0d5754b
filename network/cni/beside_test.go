package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
	"github.com/berth-run/berth/network/cni"
)

// Programs and plugins in process work side by side on the same node: all at once they take different addresses, and either
// undoes what the other did, to the last rule.
func TestBesidePrograms(t *testing.T) {
	const pods = 16
	bin := binDir(t)
	w := newWorld(t, bin, &inProcess{DefaultExec: reference(), plugins: cni.New(slog.New(slog.NewTextHandler(t.Output(), nil)))})
	programs := libcni.NewCNIConfigWithCacheDir([]string{bin}, w.dir+"/cache", reference())
	list, err := libcni.NetworkConfFromBytes([]byte(strings.ReplaceAll(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,
"ipam":{"type":"host-local","dataDir":"DIR/ipam","ranges":[[{"subnet":"10.88.0.0/27"}],[{"subnet":"fd00:88::/64"}]]}},
{"type":"portmap","capabilities":{"portMappings":true}},{"type":"firewall","ingressPolicy":"same-bridge"}]}`, "DIR", w.dir)))
	if err != nil {
		t.Fatal(err)
	}
	rt := func(n int) *libcni.RuntimeConf {
		return &libcni.RuntimeConf{ContainerID: fmt.Sprintf("pod%d", n), IfName: "eth0", NetNS: w.pod(n), CapabilityArgs: map[string]any{
			"portMappings": []map[string]any{{"hostPort": 8000 + n, "containerPort": 80, "protocol": "tcp"}},
		}}
	}
	var mu sync.Mutex
	var taken []string
	each := func(f func(n int) error) {
		t.Helper()
		var wg sync.WaitGroup
		for n := range pods {
			wg.Go(func() {
				if err := network.InNamespaces([]string{w.host}, func() error { return f(n) }); err != nil {
					t.Errorf("pod %d: %v", n, err)
				}
			})
		}
		wg.Wait()
	}
	by := func(n int) *libcni.CNIConfig {
		if n%2 == 0 {
			return programs
		}
		return w.cni
	}
	for n := range pods {
		w.namespace(fmt.Sprintf("pod%d", n))
	}
	// The first makes chains that all share. Reference plugins that race there fail: iptables has made the chain meanwhile.
	if err := network.InNamespaces([]string{w.host}, func() error {
		if _, err := programs.AddNetworkList(t.Context(), list, rt(0)); err != nil {
			return err
		}
		return programs.DelNetworkList(t.Context(), list, rt(0))
	}); err != nil {
		t.Fatal(err)
	}
	before := w.state(0)
	each(func(n int) error {
		res, err := by(n).AddNetworkList(t.Context(), list, rt(n))
		if err != nil {
			return err
		}
		r, err := types100.NewResultFromResult(res)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, ip := range r.IPs {
			taken = append(taken, ip.Address.String())
		}
		return nil
	})
	slices.Sort(taken)
	if got := len(slices.Compact(taken)); got != 2*pods {
		t.Errorf("%d different addresses of %d pods", got, pods)
	}
	each(func(n int) error { return by(n+1).CheckNetworkList(t.Context(), list, rt(n)) })
	each(func(n int) error { return by(n+1).DelNetworkList(t.Context(), list, rt(n)) })
	after := w.state(0)
	if d := diff(lasting(before), lasting(after)); d != "" || vethName.MatchString(after) {
		t.Errorf("left:\n%s\n%s", d, vethName.FindString(after))
	}
}

// Pods that are the first on their node, all at once, make once what they share.
func TestFirstPodsAtOnce(t *testing.T) {
	const pods = 12
	_, w, exec := both(t)
	list, err := libcni.NetworkConfFromBytes([]byte(strings.ReplaceAll(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,
"ipam":{"type":"host-local","dataDir":"DIR/ipam","ranges":[[{"subnet":"10.88.0.0/27"}],[{"subnet":"fd00:88::/64"}]]}},
{"type":"portmap","capabilities":{"portMappings":true}},{"type":"firewall","ingressPolicy":"isolated"}]}`, "DIR", w.dir)))
	if err != nil {
		t.Fatal(err)
	}
	for n := range pods {
		w.namespace(fmt.Sprintf("pod%d", n))
	}
	var wg sync.WaitGroup
	for n := range pods {
		wg.Go(func() {
			if err := network.InNamespaces([]string{w.host}, func() error {
				_, err := w.cni.AddNetworkList(t.Context(), list, &libcni.RuntimeConf{ContainerID: fmt.Sprintf("pod%d", n), IfName: "eth0", NetNS: w.pod(n), CapabilityArgs: map[string]any{
					"portMappings": []map[string]any{{"hostPort": 8000 + n, "containerPort": 80, "protocol": "tcp"}},
				}})
				return err
			}); err != nil {
				t.Errorf("pod %d: %v", n, err)
			}
		})
	}
	wg.Wait()
	if exec.programs > 0 {
		t.Errorf("%d calls were left to programs", exec.programs)
	}
	seen := map[string]bool{}
	for line := range strings.SplitSeq(w.state(0), "\n") {
		rule := number.ReplaceAllString(line, "rule")
		if rule != line && seen[rule] {
			t.Errorf("made more than once: %s", rule)
		}
		seen[rule] = true
	}
	if len(seen) < 4*pods {
		t.Errorf("%d rules", len(seen))
	}
}

var number = regexp.MustCompile(`rule \d+:`)

// A node without iptables, nft and programs of plugins has masquerading and host ports all the same.
func TestBareNode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	t.Setenv("PATH", "/nonexistent")
	cni.ForgetIPTables()
	t.Cleanup(cni.ForgetIPTables)
	exec := &inProcess{DefaultExec: reference(), plugins: cni.New(slog.New(slog.NewTextHandler(t.Output(), nil)))}
	w := newWorld(t, "/nonexistent", exec)
	s := scenario{
		conf: `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,
"ipam":{"type":"host-local","dataDir":"DIR/ipam","ranges":[[{"subnet":"10.88.0.0/27"}],[{"subnet":"fd00:88::/64"}]]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}`,
		caps: object{"portMappings": []object{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}},
	}
	for _, do := range []string{"ADD", "CHECK", "DEL", "DEL"} {
		if out := w.run(s, step{do: do}); strings.HasPrefix(out, "error") {
			t.Errorf("%s: %s", do, out)
		}
		state := w.state(1)
		for _, rule := range []string{"cni_hostport hostports rule", "cni_hostport masquerading rule", "cni_plugins_masquerade masq_checks rule"} {
			if strings.Contains(state, rule) != (do != "DEL") {
				t.Errorf("after %s: rules of %q are there: %v", do, rule, do == "DEL")
			}
		}
	}
	if exec.programs > 0 {
		t.Errorf("%d calls were left to programs", exec.programs)
	}
}

// lasting are rules and files, but for the one that says which address was taken last.
func lasting(state string) string {
	all := strings.Split(state, "\n")
	return strings.Join(slices.DeleteFunc(all, func(l string) bool {
		return !strings.Contains(l, " nft ") && !strings.HasPrefix(l, "file ") || strings.Contains(l, "last_reserved_ip")
	}), "\n")
}

// Of a lock that another program does not give back the end of the context makes an error, and recovery of a panic.
func TestNothingHangsOrPanics(t *testing.T) {
	p := cni.New(slog.New(slog.NewTextHandler(t.Output(), nil)))
	_, err := p.Run(t.Context(), "bridge", json.RawMessage(`{"cniVersion":"1.0.0","name":"net","type":"bridge","vlanTrunk":[null]}`),
		[]string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=x", "CNI_NETNS=/x", "CNI_IFNAME=eth0", "CNI_PATH=/"}, reference())
	if err == nil || !strings.Contains(err.Error(), "panic") {
		t.Errorf("%v", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/net", 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(dir + "/net/lock")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() //nolint:errcheck // a test
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for range 2 {
		_, err = p.Run(ctx, "host-local", json.RawMessage(`{"cniVersion":"1.0.0","name":"net","type":"x","ipam":{"subnet":"10.0.0.0/24","dataDir":"`+dir+`"}}`),
			[]string{"CNI_COMMAND=DEL", "CNI_CONTAINERID=x", "CNI_IFNAME=eth0", "CNI_PATH=/"}, reference())
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
}

// An iptables that is killed while it is asked, as on a node that is short of processors or memory, is asked again: else the daemon would run it for
// each pod as long as it lives.
func TestIPTablesIsAskedAgain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	real, err := exec.LookPath("iptables-restore")
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\n[ -e %[1]s/well ] || kill -9 $$\nexec %[2]s \"$@\"\n", dir, real)
	for name, text := range map[string]string{"iptables": "#!/bin/sh\n", "iptables-restore": script} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	cni.ForgetIPTables()
	t.Cleanup(cni.ForgetIPTables)
	var log bytes.Buffer
	plugins := cni.New(slog.New(slog.NewTextHandler(&log, nil)))
	for range 2 {
		if err := plugins.IPTablesDiffers("nat", false); err == nil || !strings.Contains(err.Error(), "could not be asked") {
			t.Fatalf("it is killed, and %v is known of it", err)
		}
		cni.ForgetIPTables()
	}
	if err := os.WriteFile(filepath.Join(dir, "well"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := plugins.IPTablesDiffers("nat", false); err != nil {
		t.Errorf("once it can be asked: %v", err)
	}
	if lines := strings.Split(strings.TrimSpace(log.String()), "\n"); len(lines) != 2 ||
		!strings.Contains(lines[0], "signal: killed") || !strings.Contains(lines[1], "without running iptables from now on") {
		t.Errorf("the log has:\n%s", log.String())
	}
}
