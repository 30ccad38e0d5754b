package iptables

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/berth-run/berth/internal/socket"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// childEnv has the test program be a proxy that is killed: it programs Services and changes one all the time, by the backend that
// it names. With heldEnv it makes one change, once there is a file "hold" in the directory that this names.
const (
	childEnv = "BERTH_IPTABLES_CHILD"
	heldEnv  = "BERTH_IPTABLES_HELD"
)

func TestMain(m *testing.M) {
	if backend := os.Getenv(childEnv); backend != "" {
		fmt.Println(child(backend))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func child(backend string) error {
	name, err := claim(10 * time.Second)
	if err != nil {
		return err
	}
	held, err := name.File()
	if err != nil {
		return err
	}
	p, err := Open(Options{MasqueradeBit: 14, Held: held, backend: backend})
	if err != nil {
		return err
	}
	dir := os.Getenv(heldEnv)
	if dir == "" {
		return nodetest.Churn(p, 50, 10)
	}
	s := nodetest.NewState(served(1))
	if _, err := p.Sync(s); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "hold"), nil, 0o600); err != nil {
		return err
	}
	_, err = p.Apply(s.Delta(s.ServiceList[0], served(2)))
	return err
}

// claim has the network namespace be the process's, as a proxy does, once it is nobody else's.
func claim(within time.Duration) (name *socket.Name, err error) {
	for end := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		if name, err = socket.Only(context.Background(), "berth-proxy"); err == nil || time.Now().After(end) {
			return name, err
		}
	}
}

// served is a Service of one pod.
func served(pod int) *model.Service {
	return nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, ip4.Pods(pod), ip4.LoadBalancer(80)))
}

// some has Services of all kinds.
func some() *nodetest.State {
	front := ip4.LoadBalancer(80)
	front.Restricted, front.Sources = true, prefixes(ip4.Wide, ip4.Narrow)
	none := nodetest.LocalPolicy(ip4.NodePort(30081))
	none.Action = model.Drop
	s := nodetest.NewState(
		nodetest.ServiceOf("a", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, ip4.Pods(1, 2), nodetest.ClusterIP("10.96.0.1:80"), front, ip4.NodePort(30080)))),
		nodetest.ServiceOf("b", nodetest.PortOf(model.UDP, ip4.Pods(1, 2), nodetest.ClusterIP("10.96.0.2:80"), none)),
		nodetest.ServiceOf("c", nodetest.PortOf(model.SCTP, []string{"[fd01::1]:80", "[fd01::2]:80", "[fd01::3]:80"}, nodetest.ClusterIP("[fd96::1]:80"))),
		nodetest.ServiceOf("d", nodetest.PortOf(model.TCP, nil, model.Frontend{Kind: model.ExternalIP, Addr: front.Addr, Action: model.Reject})))
	s.ServiceList[0].HealthCheck.Port = 31000
	s.All.Family[model.IPv4].NodePorts.Loopback = true
	s.ServiceList[3].Ports[0].Frontends[0].Addr = nodetest.ClusterIP("203.0.113.9:80").Addr
	return s
}

// A restart changes nothing, and finds all as it should be.
func TestRestartChangesNothing(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		s := nodetest.NewSpace(t, "node")
		want := some()
		if r, err := openAt(s, backend).Sync(want); err != nil || r.Transactions != 2 {
			t.Fatalf("%+v, %v", r, err)
		}
		before := listing(s, backend)
		p := openAt(s, backend)
		if r, err := p.Sync(want); err != nil || r != (program.Report{}) {
			t.Errorf("%+v, %v\n%s", r, err, before)
		}
		// What has changed meanwhile is all that is changed: of one Service a chain of endpoints, and two of its policy.
		next := nodetest.ServiceOf("b", nodetest.PortOf(model.UDP, ip4.Pods(1), want.ServiceList[1].Ports[0].Frontends...))
		want.Delta(want.ServiceList[1], next)
		if r, err := openAt(s, backend).Sync(want); err != nil || r.Transactions != 1 || r.Objects > 2 {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// A change of endpoints writes the chains of the Service alone.
func TestChangesWriteWhatChanges(t *testing.T) {
	s := nodetest.NewState(nodetest.Crowd(20, 2).ServiceList...)
	of := func(pods ...string) *model.Service {
		return nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, pods, nodetest.ClusterIP("10.96.0.1:80")))
	}
	x := parts{model.IPv4, &s.All.Family[model.IPv4]}
	names := strings.NewReplacer(hash("test/web:p", "tcp"), "WEB", hash("test/web:p", "tcp", "10.1.0.1:80"), "ONE", hash("test/web:p", "tcp", "10.1.0.2:80"), "TWO")
	b, grown := change(x, []model.Change{{Old: of("10.1.0.1:80"), New: of("10.1.0.2:80")}})
	got := names.Replace(b.String())
	want := `*nat
:KUBE-SEP-TWO - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-SEP-ONE - [0:0]
-A KUBE-SEP-TWO -s 10.1.0.2/32 -m comment --comment "test/web:p" -j KUBE-MARK-MASQ
-A KUBE-SEP-TWO -p tcp -m comment --comment "test/web:p" -m tcp -j DNAT --to-destination 10.1.0.2:80
-A KUBE-SVC-WEB ! -s 10.1.0.0/16 -d 10.96.0.1/32 -p tcp -m comment --comment "test/web:p cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -m comment --comment "test/web:p -> 10.1.0.2:80" -j KUBE-SEP-TWO
-X KUBE-SEP-ONE
COMMIT
`
	lines := func(s string) string {
		l := strings.Split(s, "\n")
		slices.Sort(l)
		return strings.Join(l, "\n")
	}
	if lines(got) != lines(want) {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	if grown != [tables]int{} || b.put() != [tables]int{nat: 4} {
		t.Errorf("%v more rules, %v of them put in", grown, b.put())
	}
	if b, grown := change(x, []model.Change{{Old: of("10.1.0.1:80"), New: of("10.1.0.1:80")}}); !b.empty() || grown != [tables]int{} {
		t.Errorf("%s, %v", b, grown)
	}
}

// Whatever was flushed, changed or put in is mended; what is another's is left alone. Jumps come before all else.
func TestForeignChangesAreMended(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		s := nodetest.NewSpace(t, "node")
		iptables := programs{family: model.IPv4, backend: backend}.name("")
		for _, args := range []string{"-A FORWARD -s 10.9.9.9 -j DROP", "-t nat -N MINE", "-t nat -A PREROUTING -j MINE", "-N KUBE-FIREWALL", "-A KUBE-FIREWALL -d 10.8.8.8 -j DROP"} {
			s.Run(iptables, strings.Fields(args)...)
		}
		foreign := []string{"-A FORWARD -s 10.9.9.9/32 -j DROP", ":MINE -", "-A PREROUTING -j MINE", "-A KUBE-FIREWALL -d 10.8.8.8/32 -j DROP"}
		p := openAt(s, backend)
		want := some()
		if _, err := p.Sync(want); err != nil {
			t.Fatal(err)
		}
		before := listing(s, backend)
		for _, f := range foreign {
			if !strings.Contains(before, f) {
				t.Errorf("%s is gone:\n%s", f, before)
			}
		}
		if strings.Index(before, "-A PREROUTING -j MINE") < strings.Index(before, "-A PREROUTING -m comment") {
			t.Error("another's rule comes first")
		}
		sep := endpointChain + hash("test/a:p", "tcp", "10.1.1.2:8080")
		for _, change := range []string{
			"-t nat -F", "-t nat -F KUBE-SERVICES", "-F", "-t nat -D PREROUTING 1", "-t nat -F " + sep,
			"-t nat -I KUBE-SERVICES 1 -j ACCEPT", "-t nat -A KUBE-SERVICES -j RETURN", "-A KUBE-FORWARD -j DROP",
			"-t nat -N KUBE-SVC-AAAAAAAAAAAAAAAA", "-D KUBE-CLUSTER-IPS 2", "-t nat -R KUBE-MARK-MASQ 1 -j MARK --set-xmark 0x8000/0x8000",
			"-t mangle -X KUBE-PROXY-CANARY", "-F KUBE-FIREWALL",
		} {
			s.Run(iptables, strings.Fields(change)...)
			if r, err := p.Verify(); err != nil || r == (program.Report{}) {
				t.Errorf("%s: %+v, %v", change, r, err)
			}
			if r, err := p.Verify(); err != nil || r != (program.Report{}) {
				t.Errorf("%s: once more: %+v, %v", change, r, err)
			}
			if change == "-t nat -F" || change == "-F" || change == "-F KUBE-FIREWALL" { // and with it what was another's
				before = listing(s, backend)
			}
			if after := listing(s, backend); sorted(after) != sorted(before) {
				t.Errorf("%s: not as it was:\n%s\nwas\n%s", change, after, before)
			}
		}
		// A change that does not fit is made after the kernel was read.
		s.Run(iptables, "-t", "nat", "-F", "KUBE-SERVICES")
		if _, err := p.Apply(want.Delta(want.ServiceList[0], nil)); err != nil {
			t.Error(err)
		}
		if r, err := p.Verify(); err != nil || r != (program.Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
		// A chain that another's rule leads to stays, and does nothing.
		s.Run(iptables, "-t", "nat", "-N", "KUBE-SVC-BBBBBBBBBBBBBBBB")
		s.Run(iptables, "-t", "nat", "-A", "KUBE-SVC-BBBBBBBBBBBBBBBB", "-j", "ACCEPT")
		s.Run(iptables, "-t", "nat", "-A", "MINE", "-j", "KUBE-SVC-BBBBBBBBBBBBBBBB")
		if _, err := p.Verify(); err != nil {
			t.Error(err)
		}
		if list := listing(s, backend); !strings.Contains(list, ":KUBE-SVC-BBBBBBBBBBBBBBBB") || strings.Contains(list, "-A KUBE-SVC-BBBBBBBBBBBBBBBB") {
			t.Error(list)
		}
		if r, err := p.Verify(); err != nil || r != (program.Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// A flush by another program, as of firewalld, is seen and told.
func TestFlushIsSeen(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		s := nodetest.NewSpace(t, "node")
		p, err := Open(Options{MasqueradeBit: 14, Period: 50 * time.Millisecond, backend: backend, enter: s.Do})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		want := some()
		if _, err := p.Sync(want); err != nil {
			t.Fatal(err)
		}
		before := listing(s, backend)
		select {
		case <-p.Changed():
			t.Error("told of nothing")
		case <-time.After(300 * time.Millisecond):
		}
		for _, table := range []string{"mangle", "nat", "filter"} {
			for _, what := range []string{"-F", "-X"} {
				s.Run(programs{family: model.IPv4, backend: backend}.name(""), "-t", table, what)
			}
		}
		select {
		case <-p.Changed():
		case <-time.After(20 * time.Second):
			t.Fatal("not seen")
		}
		if _, err := p.Verify(); err != nil {
			t.Error(err)
		}
		if after := listing(s, backend); sorted(after) != sorted(before) {
			t.Errorf("%s\nwas\n%s", after, before)
		}
	})
}

// After any changes, written by themselves, the kernel has what it has when all is written at once.
func TestChangesAreAsAWhole(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		for seed := range 2 {
			r := nodetest.NewWorld(seed)
			m, err := model.New(r.Config())
			if err != nil {
				t.Fatal(err)
			}
			s := nodetest.NewSpace(t, "node")
			p := openAt(s, backend)
			for step := range 25 {
				for range 1 + r.IntN(3) {
					n := r.IntN(6)
					if svc := r.Service(n); r.In(5) {
						m.DeleteService(nameOf(svc.Namespace, svc.Name))
					} else {
						m.SetService(svc)
					}
					m.SetSlice(r.Slice(n, 4, discoveryv1.AddressTypeIPv4))
					m.SetSlice(r.Slice(n, 4, discoveryv1.AddressTypeIPv6))
				}
				if r.In(10) {
					if err := m.SetConfig(r.Config()); err != nil {
						t.Fatal(err)
					}
				}
				d := m.Commit()
				if step == 0 {
					_, err = p.Sync(m.State())
				} else {
					_, err = p.Apply(&d)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			fresh := nodetest.NewSpace(t, "node")
			if _, err := openAt(fresh, backend).Sync(m.State()); err != nil {
				t.Fatal(err)
			}
			if got, want := sorted(listing(s, backend)), sorted(listing(fresh, backend)); got != want {
				t.Errorf("seed %d:\n%s\nat once\n%s", seed, got, want)
			}
			if r, err := p.Verify(); err != nil || r != (program.Report{}) {
				t.Errorf("seed %d: %+v, %v", seed, r, err)
			}
		}
	})
}

// Tables go with Remove, and nothing else does; a family that is disabled goes, too.
func TestRemove(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		s := nodetest.NewSpace(t, "node")
		s.Run(programs{family: model.IPv4, backend: backend}.name(""), "-A", "FORWARD", "-s", "10.9.9.9", "-j", "DROP")
		made := func() (out []string) { // without the kernel's own chains, which stay
			for line := range strings.Lines(listing(s, backend)) {
				if strings.HasPrefix(line, "-A ") || strings.HasSuffix(line, " -\n") {
					out = append(out, line)
				}
			}
			return out
		}
		before := made()
		p := openAt(s, backend)
		want := some()
		want.All.Family[model.IPv4].NodePorts.Loopback = true
		if _, err := p.Sync(want); err != nil {
			t.Fatal(err)
		}
		want.All.Family[model.IPv6].Enabled = false
		if _, err := p.Sync(want); err != nil {
			t.Fatal(err)
		}
		if list := s.Run(programs{family: model.IPv6, backend: backend}.name("save")); strings.Contains(list, "KUBE-") {
			t.Error(list)
		}
		err := s.Do(func() error {
			removed, err := RemoveOwn()
			if left := strings.Join(OwnLeft(), "; "); err != nil || len(removed) > 0 || !strings.Contains(left, "chain KUBE-CLUSTER-IPS of iptables-"+backend) {
				t.Errorf("of rules in force: %v, removed %q, left %q", err, removed, left)
			}
			removed, err = Remove()
			if left := OwnLeft(); len(left) > 0 {
				t.Error(left)
			}
			if text := strings.Join(removed, "; "); !strings.Contains(text, "chains of iptables-"+backend+" in table nat") {
				t.Error(text)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		if after := made(); !slices.Equal(after, before) || len(before) != 1 {
			t.Errorf("left behind:\n%s\nwas\n%s", after, before)
		}
		const sysctl = "/proc/sys/net/ipv4/conf/all/route_localnet"
		if got := s.Run("cat", sysctl); got != "0\n" {
			t.Errorf("route_localnet is %s", got)
		}

		// Where there is a kubelet it has the chain, too, and both stay.
		want.All.Family[model.IPv6].Enabled = true
		if _, err := p.Sync(want); err != nil {
			t.Fatal(err)
		}
		s.Run(programs{family: model.IPv4, backend: backend}.name(""), "-t", "mangle", "-N", kubeletCanary)
		if err := s.Do(func() error { _, err := Remove(); return err }); err != nil {
			t.Error(err)
		}
		if got := s.Run("cat", sysctl); got != "1\n" || !strings.Contains(strings.Join(made(), ""), "-A KUBE-FIREWALL") {
			t.Errorf("route_localnet is %s, and there is\n%s", got, made())
		}
	})
}

// Ten times the proxy is killed at a random moment, of a load or of changes, and started again: no connection that is open
// breaks, and no new one fails.
func TestKillsLoseNoConnection(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		l := nodetest.New(t, 2)
		start := func() *exec.Cmd {
			c := exec.Command("/proc/self/exe")
			c.Env = append(os.Environ(), childEnv+"="+backend)
			if err := l.Node.Do(c.Start); err != nil {
				t.Fatal(err)
			}
			return c
		}
		c := start()
		for began := time.Now(); ; { // until it has programmed the first time
			if a := l.Client.AskFor(nodetest.Quiet, ip4.TCP, nodetest.At(ip4.Node, 30080)); strings.HasPrefix(a, "pod") {
				break
			}
			if time.Since(began) > time.Minute {
				t.Fatal("nothing is programmed")
			}
		}
		open := l.Connections(l.Client, ip4.TCP, nodetest.At(ip4.LoadIP, 80), 20)
		stop, asked := make(chan struct{}), make(chan int)
		go func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					asked <- n
					return
				default:
				}
				if a := l.Client.Ask(ip4.TCP, nodetest.At(ip4.Node, 30080)); !strings.HasPrefix(a, "pod") {
					t.Errorf("connection %d: %q", n, a)
				}
			}
		}()
		for range 10 {
			time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
			_ = c.Process.Kill()
			if err := c.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Errorf("it has ended by itself: %v", err)
			}
			c = start()
		}
		close(stop)
		t.Logf("%d connections during 10 kills", <-asked)
		_ = c.Process.Kill()
		_ = c.Wait()
		l.Alive(open)
		// And what is left is mended.
		p := openAt(l.Node, backend)
		if _, err := p.Sync(nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, ip4.Pods(1), ip4.LoadBalancer(80))))); err != nil {
			t.Fatal(err)
		}
		if r, err := p.Verify(); err != nil || r != (program.Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
		l.Want(l.Client, ip4.TCP, nodetest.At(ip4.LoadIP, 80), "pod1 10.1.1.1")
	})
}

// What a killed proxy was about to write is not written once the next one has read the tables: the program ends with the proxy, and
// where that is a wrapper, whose own programs live on, it is waited for.
func TestKilledProxyWritesNothingLater(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		name := programs{backend: backend}.name("restore")
		real, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, tc := range []struct {
			name, wrapper string
			livesOn       bool
		}{
			{"itself", `wait_for_it; exec "$real" "$@"`, false},
			{"of a wrapper", `exec 4<&0; { wait_for_it; exec "$real" "$@"; } <&4 & wait; exit $?`, true},
		} {
			t.Run(tc.name, func(t *testing.T) {
				s, dir := nodetest.NewSpace(t, "node"), t.TempDir()
				at := func(file string) string { return filepath.Join(dir, file) }
				if err := unix.Mkfifo(at("go"), 0o600); err != nil {
					t.Fatal(err)
				}
				// It says that it is there by waiting for the fifo.
				script := fmt.Sprintf("#!/bin/sh\nreal=%s\nwait_for_it() { if [ -e %s ]; then read -r _ < %s; fi; }\n%s\n", real, at("hold"), at("go"), tc.wrapper)
				if err := os.WriteFile(at(name), []byte(script), 0o700); err != nil {
					t.Fatal(err)
				}
				c := exec.Command("/proc/self/exe")
				c.Env = append(os.Environ(), childEnv+"="+backend, heldEnv+"="+dir, "PATH="+dir+":"+os.Getenv("PATH"))
				if err := s.Do(c.Start); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
				var letGo *os.File // somebody waits for the other end
				for end := time.Now().Add(time.Minute); letGo == nil; time.Sleep(5 * time.Millisecond) {
					if letGo, err = os.OpenFile(at("go"), os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil && time.Now().After(end) {
						t.Fatalf("nothing is written: %v", err)
					}
				}
				defer letGo.Close()
				_ = c.Process.Kill()
				_ = c.Wait()
				release := func() error { _, err := letGo.WriteString("go\n"); return err }
				err = s.Do(func() error {
					if tc.livesOn {
						if _, err := claim(0); !errors.Is(err, socket.ErrInUse) {
							t.Errorf("what it has started is not waited for: %v", err)
						}
						if err := release(); err != nil {
							t.Error(err)
						}
					}
					name, err := claim(time.Minute)
					if err == nil {
						defer name.Close()
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
				p := openAt(s, backend)
				if _, err := p.Sync(nodetest.NewState(served(1))); err != nil {
					t.Fatal(err)
				}
				if err := release(); !errors.Is(err, unix.EPIPE) {
					t.Errorf("the program has not ended with the proxy, and writes now: %v", err)
				}
				if r, err := p.Verify(); err != nil || r != (program.Report{}) {
					t.Errorf("the tables have changed since: %+v, %v", r, err)
				}
			})
		}
	})
}

func TestMissingProgramsAreNamed(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := programs{}.save()
	for _, err := range []error{err, Supported(model.IPv6)} {
		if err == nil || !strings.Contains(err.Error(), "tables-save is not there: install the package iptables") {
			t.Error(err)
		}
	}
	if got := place("iptables-restore: line 2 failed", "*nat\n-A X\n"); got != "iptables-restore: line 2 failed: -A X" {
		t.Error(got)
	}
}
