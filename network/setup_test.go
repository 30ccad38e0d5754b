package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestSetupTellsThePluginsAboutThePod(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.plugin("x", good)
	n.plugin("y", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x", "y"))
	m := n.open()
	p.PortMappings = []PortMapping{
		{Protocol: "TCP", ContainerPort: 80, HostPort: 8080, HostIP: "127.0.0.1"},
		{Protocol: "tcp", ContainerPort: 81},
		{Protocol: "udp", ContainerPort: 53, HostPort: 5353},
	}
	p.Annotations = map[string]string{IngressBandwidth: "10M", EgressBandwidth: "1500k", "other": "x"}
	p.CgroupParent = "/kubepods/podX"
	p.DNS = &DNS{Servers: []string{"10.96.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}}
	res, err := m.Setup(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(res.IPs); got != "[10.90.0.5 fd00:90::5]" {
		t.Errorf("addresses %s", got)
	}
	if string(res.Conflist) != list("a", "x", "y") {
		t.Errorf("conflist %s", res.Conflist)
	}
	if !strings.Contains(string(res.Raw), "fd00:90::5/64") {
		t.Errorf("raw %s", res.Raw)
	}
	lines := n.lines()
	if len(lines) != 2 {
		t.Fatalf("calls %q", lines)
	}
	wantLine := "x ADD netns=" + p.NetNS + " id=" + podID + " if=eth0 args=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=" + podID + ";K8S_POD_UID=u-1 conf="
	if !strings.HasPrefix(lines[0], wantLine) {
		t.Errorf("%s\nwant %s", lines[0], wantLine)
	}
	want := map[string]any{
		"portMappings": []any{
			map[string]any{"hostPort": 8080., "containerPort": 80., "protocol": "tcp", "hostIP": "127.0.0.1"},
			map[string]any{"hostPort": 5353., "containerPort": 53., "protocol": "udp"},
		},
		"bandwidth":    map[string]any{"ingressRate": 1e7, "ingressBurst": 2147483647., "egressRate": 1.5e6, "egressBurst": 2147483647.},
		"cgroupPath":   "/kubepods/podX",
		"dns":          map[string]any{"servers": []any{"10.96.0.10"}, "searches": []any{"svc"}, "options": []any{"ndots:5"}},
		podAnnotations: map[string]any{IngressBandwidth: "10M", EgressBandwidth: "1500k", "other": "x"},
	}
	if got := told(t, lines[0])["runtimeConfig"]; !reflect.DeepEqual(got, want) {
		t.Errorf("runtimeConfig %v\nwant %v", got, want)
	}
	if told(t, lines[1])["prevResult"] == nil {
		t.Error("the second plugin got no result of the first")
	}
}

func TestCapabilitiesThatNoPluginTakesAreNotKept(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x"}]}`)
	p.Annotations = map[string]string{"secret": "annotation"}
	if _, err := n.open().Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	for _, file := range n.caches() {
		if s := read(t, file); strings.Contains(s, "secret") {
			t.Errorf("cache: %s", s)
		}
	}
}

func TestSetupRefusesBadRequests(t *testing.T) {
	n := newNode(t)
	good1 := n.pod()
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	m := n.open()
	for name, spoil := range map[string]func(*Pod){
		"another argument in the name": func(p *Pod) { p.Name = "a;IP=10.0.0.1" },
		"newline in the uid":           func(p *Pod) { p.UID = "a\nb" },
		"id with a slash":              func(p *Pod) { p.ID = "../x" },
		"no id":                        func(p *Pod) { p.ID = "" },
		"host port":                    func(p *Pod) { p.PortMappings = []PortMapping{{"tcp", 80, 65536, ""}} },
		"negative host port":           func(p *Pod) { p.PortMappings = []PortMapping{{"tcp", 80, -1, ""}} },
		"container port":               func(p *Pod) { p.PortMappings = []PortMapping{{"tcp", 0, 80, ""}} },
		"protocol":                     func(p *Pod) { p.PortMappings = []PortMapping{{"icmp", 80, 80, ""}} },
		"host IP":                      func(p *Pod) { p.PortMappings = []PortMapping{{"tcp", 80, 80, "localhost"}} },
		"bandwidth":                    func(p *Pod) { p.Annotations = map[string]string{IngressBandwidth: "fast"} },
		"conflist":                     func(p *Pod) { p.Conflist = []byte("{") },
	} {
		p := good1
		spoil(&p)
		_, err := m.Setup(t.Context(), p)
		if !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
		if calls := n.calls(); calls != nil {
			t.Errorf("%s: ran %v", name, calls)
		}
		if err := m.Teardown(t.Context(), p); err != nil && name != "conflist" {
			t.Errorf("%s: Teardown: %v", name, err)
		}
		n.lines()
	}
}

func TestErrorsOfPlugins(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.write(n.conf+"/10-a.conflist", list("a", "x", "y"))
	n.plugin("x", good)
	for name, tc := range map[string]struct {
		body, want string
		class      error
	}{
		"error of the specification": {`echo '{"cniVersion":"1.0.0","code":7,"msg":"no subnet","details":"none"}'; exit 1`, "no subnet; none (code 7)", nil},
		"try again later":            {`echo '{"cniVersion":"1.0.0","code":11,"msg":"agent starts"}'; exit 1`, "agent starts (code 11)", errdefs.ErrUnavailable},
		"silent":                     {`exit 3`, "exit status 3, no message", nil},
		"only stderr":                {`echo oops >&2; exit 3`, `exit status 3, no message, stderr: "oops"`, nil},
		"no JSON":                    {`echo "panic: x"; exit 2`, `exit status 2, stdout: "panic: x"`, nil},
		"torn result":                {`echo '{"cniVersion":"1.0.0","ips":[{'`, "unexpected end", nil},
		"no result":                  {`true`, "it claims success, and gives no result", nil},
		"no JSON, and success":       {`echo hello`, `it claims success, and its result is none: invalid character 'h' looking for beginning of value, stdout: "hello"`, nil},
		"a list":                     {`echo '[]'`, "its result is none", nil},
		"null":                       {`echo null`, "no address for eth0", nil},
		"addresses that are none":    {`echo '{"cniVersion":"1.0.0","ips":[{"address":"here"}]}'`, "here", nil},
		"null as an address":         {`echo '{"cniVersion":"1.0.0","ips":[null]}'`, "its result has a null in a list", nil},
		"null of an older version":   {`echo '{"cniVersion":"0.4.0","ips":[null],"interfaces":[null]}'`, "its result has a null in a list", nil},
		"null as a route":            {`echo '{"cniVersion":"0.4.0","routes":[null]}'`, "its result has a null in a list", nil},
		"result of another version":  {`echo '{"cniVersion":"7.0.0"}'`, "7.0.0", nil},
		"no address":                 {`echo '{"cniVersion":"1.0.0"}'`, "no address for eth0", nil},
		"address of the bridge only": {`echo '{"cniVersion":"1.0.0","interfaces":[{"name":"cni0"}],"ips":[{"address":"10.90.0.1/24","interface":0}]}'`, "no address for eth0", nil},
		"killed":                     {`kill -9 $$`, "signal: killed", nil},
		"endless output":             {`exec yes`, "more than 1048576 bytes of output", errdefs.ErrResourceExhausted},
		"endless output, ignored end": {
			`trap '' PIPE; while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx 2>/dev/null; done`,
			"more than 1048576 bytes of output", errdefs.ErrResourceExhausted,
		},
	} {
		t.Run(name, func(t *testing.T) {
			n.plugin("y", tc.body)
			m := n.open()
			_, err := m.Setup(within(t, 20*time.Second), p)
			if err == nil || !strings.Contains(err.Error(), tc.want) || tc.class != nil && !errors.Is(err, tc.class) {
				t.Fatalf("%v, want %q", err, tc.want)
			}
			if !strings.Contains(err.Error(), "pod shop/web-0 (0123456789ab): network a: ") {
				t.Errorf("names no pod or network: %v", err)
			}
			if !strings.Contains(tc.want, "no address") && !strings.Contains(err.Error(), `plugin type="y" failed (add)`) {
				t.Errorf("names no plugin: %v", err)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("%d bytes of error", len(err.Error()))
			}
		})
	}
}

func TestStderrIsBounded(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	n.plugin("x", `head -c 10000000 /dev/zero >&2; exit 1`)
	_, err := n.open().Setup(within(t, 20*time.Second), p)
	if err == nil || len(err.Error()) > 3000 {
		t.Errorf("%d bytes: %.100v", len(fmt.Sprint(err)), err)
	}
}

// A hanging plugin holds the call no longer than its context, and leaves no process.
func TestHangingPluginEndsWithTheContext(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	pids := n.t.TempDir() + "/pids"
	n.plugin("x", `trap '' TERM INT
sleep 1000 & echo $! >> `+pids+`
(trap '' TERM; sleep 1001) & echo $! >> `+pids+`
echo $$ >> `+pids+`.tmp; cat `+pids+` >> `+pids+`.tmp; mv `+pids+`.tmp `+pids+`
[ $CNI_COMMAND = DEL ] || wait`)
	m := n.open()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for {
			data, _ := os.ReadFile(pids)
			if strings.Count(string(data), "\n") == 3 {
				cancel()
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	start := time.Now()
	_, err := m.Setup(ctx, p)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `plugin type="x"`) {
		t.Errorf("%v", err)
	}
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	for _, s := range strings.Fields(read(t, pids)) {
		pid, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; running(pid); i++ {
			if i == 200 {
				t.Fatalf("process %d of the plugin runs on", pid)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	_, err = m.Setup(within(t, 200*time.Millisecond), p)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func running(pid int) bool {
	data, err := os.ReadFile("/proc/" + itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(data), ") Z ") && syscall.Kill(pid, 0) == nil
}

// A plugin's daemon that keeps the plugin's stdout open must not hold the call.
func TestPluginThatLeavesAProcessBehind(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	pid := t.TempDir() + "/pid"
	n.plugin("x", `sleep 30 & echo $! > `+pid+"\n"+good)
	start := time.Now()
	res, err := n.open().Setup(t.Context(), p)
	if err != nil || len(res.IPs) != 2 {
		t.Errorf("%+v, %v", res, err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	if id, err := strconv.Atoi(read(t, pid)); err == nil {
		_ = syscall.Kill(id, syscall.SIGKILL)
	}
}

func TestPluginThatIsJustBeingInstalled(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	sh, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(sh)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(n.bin+"/x", os.O_CREATE|os.O_WRONLY, 0o700) //nolint:gosec // a program
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, func() { _ = f.Close() })
	m := n.open()
	_, err = m.Setup(t.Context(), p) // the shell runs the configuration as a script and fails
	if err == nil || errors.Is(err, syscall.ETXTBSY) {
		t.Errorf("%v", err)
	}
}

func TestParseRate(t *testing.T) {
	for s, want := range map[string]uint64{
		"1000": 1000, "1k": 1000, "10M": 1e7, "1G": 1e9, "1Ki": 1024, "1.5M": 1.5e6, "+2M": 2e6, "1e6": 1e6, "1E+6": 1e6, "1P": 1e15,
		"1000.0001": 1001, "1000000m": 1000, "1000001m": 1001, "0.5Mi": 524288, "2.M": 2e6,
		"999": 0, "1.1P": 0, "1Pi": 0, "-1M": 0, "": 0, "M": 0, "1 M": 0, "1Mbit": 0, "1e99": 0, "1e999999999": 0, "0": 0, "1E": 0,
		"999999999999999999P": 0, "1m": 0, "1e-3": 0, "1kk": 0, ".5M": 0,
	} {
		got, ok := parseRate(s)
		if ok != (want != 0) || ok && got != want {
			t.Errorf("%q: %d, %v, want %d", s, got, ok, want)
		}
	}
}

func FuzzParseRate(f *testing.F) {
	f.Add("10M")
	f.Add("1.5e3")
	f.Fuzz(func(t *testing.T, s string) {
		if v, ok := parseRate(s); ok && (v < 1e3 || v > 1e15) {
			t.Errorf("%q: %d", s, v)
		}
	})
}
