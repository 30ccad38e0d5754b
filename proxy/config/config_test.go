package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/berth-run/berth/proxy/model"
)

const header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

func write(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.conf")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// load reads a command line.
func load(t *testing.T, args ...string) (*Config, error) {
	t.Helper()
	set := pflag.NewFlagSet("proxy", pflag.ContinueOnError)
	var f Flags
	f.Add(set)
	if err := set.Parse(args); err != nil {
		return nil, err
	}
	return f.Load()
}

func mustLoad(t *testing.T, args ...string) *Config {
	t.Helper()
	c, err := load(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What kubeadm 1.37 writes sets nothing but the way to the API server, the pods' range and the mode, which it keeps at what kube-proxy's
// default is today.
func TestKubeadmsConfigMapIsTheDefault(t *testing.T) {
	c, err := Load("testdata/kubeadm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.ClusterCIDR = "10.244.0.0/16"
	want.Mode = "iptables"
	want.ClientConnection.Kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf"
	want.Logging.FlushFrequency = c.Logging.FlushFrequency // 0 and 5s are both no setting of somebody's
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	m := (&Config{Proxy: *c}).Model("node", true, true)
	if m.DetectLocal != model.ModeClusterCIDR || !reflect.DeepEqual(m.ClusterCIDRs, []string{"10.244.0.0/16"}) || m.NodePortAddresses != nil {
		t.Errorf("model: %+v", m)
	}
	if unused := (&Config{Proxy: *c}).Unused(); unused != nil {
		t.Errorf("it has %q", unused)
	}
}

func TestDefaultsAreKubeProxys(t *testing.T) {
	c := mustLoad(t)
	p := &c.Proxy
	for _, tc := range []struct{ what, got, want string }{
		{"bind", p.BindAddress, "0.0.0.0"},
		{"health", p.HealthzBindAddress, "0.0.0.0:10256"},
		{"metrics", p.MetricsBindAddress, "127.0.0.1:10249"},
		{"local", string(p.DetectLocalMode), "ClusterCIDR"},
		{"mode", string(p.Mode), ""},
		{"content type", p.ClientConnection.ContentType, "application/vnd.kubernetes.protobuf"},
		{"period", c.SyncPeriod().String(), "30s"},
		{"established", p.Conntrack.TCPEstablishedTimeout.Duration.String(), "24h0m0s"},
		{"close wait", p.Conntrack.TCPCloseWaitTimeout.Duration.String(), "1h0m0s"},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: %q, want %q", tc.what, tc.got, tc.want)
		}
	}
	if *p.Conntrack.MaxPerCore != 32768 || *p.Conntrack.Min != 131072 || *p.OOMScoreAdj != -999 || p.ClientConnection.QPS != 5 || p.ClientConnection.Burst != 10 {
		t.Errorf("%+v", p)
	}
	six, err := Load(write(t, header+"bindAddress: fd00::1\n"))
	if err != nil {
		t.Fatal(err)
	}
	if six.HealthzBindAddress != "[::]:10256" || six.MetricsBindAddress != "[::1]:10249" {
		t.Errorf("with an IPv6 address: %s %s", six.HealthzBindAddress, six.MetricsBindAddress)
	}
}

func TestModesDefaults(t *testing.T) {
	for mode, want := range map[string][]string{"": nil, "nftables": {"primary"}, "iptables": nil} {
		file := mustLoad(t, "--config", write(t, header+"mode: \""+mode+"\"\niptables: {masqueradeAll: true}\n"))
		flags := mustLoad(t, "--proxy-mode", mode, "--masquerade-all")
		for name, c := range map[string]*Config{"file": file, "flags": flags} {
			if got := c.Model("n", true, true); !reflect.DeepEqual(got.NodePortAddresses, want) {
				t.Errorf("%s %q: %q, want %q", name, mode, got.NodePortAddresses, want)
			}
		}
		if got := file.MasqueradeAll(); got != (mode != "nftables") {
			t.Errorf("file %q: masqueradeAll is %v", mode, got)
		}
		if !flags.MasqueradeAll() {
			t.Errorf("flags %q: masqueradeAll is false", mode)
		}
	}
}

// Each flag of kube-proxy 1.37 is taken (cmd/kube-proxy/app/options.go, component-base's of logs), but for the program's own: help and version.
func TestKubeProxysFlagsAreTaken(t *testing.T) {
	for _, args := range []string{
		"config=f", "write-config-to=f", "cleanup", "feature-gates=A=true", "kubeconfig=f", "master=https://h", "kube-api-content-type=t", "kube-api-burst=1",
		"kube-api-qps=1", "hostname-override=n", "bind-address=10.0.0.1", "healthz-bind-address=0.0.0.0:1", "metrics-bind-address=0.0.0.0:1", "bind-address-hard-fail",
		"profiling", "show-hidden-metrics-for-version=1.36", "init-only", "proxy-mode=nftables", "iptables-masquerade-bit=1", "masquerade-all",
		"iptables-localhost-nodeports", "iptables-sync-period=1m", "iptables-min-sync-period=1s", "ipvs-sync-period=1m", "ipvs-min-sync-period=1s",
		"ipvs-scheduler=rr", "ipvs-exclude-cidrs=10.0.0.0/8", "ipvs-strict-arp", "ipvs-tcp-timeout=1s", "ipvs-tcpfin-timeout=1s", "ipvs-udp-timeout=1s",
		"detect-local-mode=NodeCIDR", "pod-bridge-interface=b", "pod-interface-name-prefix=p", "cluster-cidr=10.0.0.0/8", "nodeport-addresses=primary",
		"oom-score-adj=0", "conntrack-max-per-core=1", "conntrack-min=1", "conntrack-tcp-timeout-established=1s", "conntrack-tcp-timeout-close-wait=1s",
		"conntrack-tcp-be-liberal", "conntrack-udp-timeout=1s", "conntrack-udp-timeout-stream=1s", "config-sync-period=1m", "healthz-port=1", "metrics-port=1",
		"logging-format=json", "log-flush-frequency=1s", "v=2", "vmodule=a=1", "log-text-split-stream", "log-text-info-buffer-size=1Ki",
		"log-json-split-stream", "log-json-info-buffer-size=1Ki",
	} {
		set := pflag.NewFlagSet("proxy", pflag.ContinueOnError)
		var f Flags
		f.Add(set)
		if err := set.Parse([]string{"--" + args}); err != nil {
			t.Errorf("--%s: %v", args, err)
			continue
		}
		if strings.HasPrefix(args, "config=") {
			continue
		}
		if _, err := f.Load(); err != nil {
			t.Errorf("--%s: %v", args, err)
		}
		name, _, _ := strings.Cut(args, "=")
		if !strings.Contains(set.FlagUsages(), "--"+name) && set.Lookup(name).Deprecated == "" {
			t.Errorf("--%s is not told by --help", name)
		}
	}
}

func TestLoopbackNodePortsWhereTheyAreAskedFor(t *testing.T) {
	for _, tc := range []struct {
		content    string
		ipv4, ipv6 bool
	}{
		{"", false, false},
		{"mode: nftables\n", false, false},
		{"mode: nftables\nnodePortAddresses: [all]\n", false, false},
		{"mode: nftables\nnodePortAddresses: [primary, localhost]\n", true, true},
		{"nodePortAddresses: [10.0.0.0/8, 127.0.0.0/8]\n", true, false},
		{"nodePortAddresses: ['::1/128', primary]\n", false, true},
		{"nodePortAddresses: [localhost]\nfeatureGates: {KubeProxyNFTablesLocalhostNodePorts: true}\n", true, true},
		{"nodePortAddresses: [localhost]\nfeatureGates: {KubeProxyNFTablesLocalhostNodePorts: false}\n", false, false},
		{"featureGates: {KubeProxyNFTablesLocalhostNodePorts: true}\n", false, false},
		{"iptables: {localhostNodePorts: null}\n", false, false},
		{"iptables: {localhostNodePorts: true}\n", true, false},
		{"mode: nftables\niptables: {localhostNodePorts: true}\n", false, false},
		{"mode: iptables\nnodePortAddresses: [localhost]\n", false, false},
	} {
		c := mustLoad(t, "--config", write(t, header+tc.content))
		if ipv4, ipv6 := c.LoopbackNodePorts(); ipv4 != tc.ipv4 || ipv6 != tc.ipv6 {
			t.Errorf("%q: %v, %v", tc.content, ipv4, ipv6)
		}
		if unused := c.Unused(); unused != nil {
			t.Errorf("%q has no effect: %q", tc.content, unused)
		}
	}
	for args, want := range map[string]bool{"--nodeport-addresses=localhost": true, "--iptables-localhost-nodeports": true, "--iptables-localhost-nodeports=false": false, "--nodeport-addresses=all": false} {
		if ipv4, _ := mustLoad(t, args).LoopbackNodePorts(); ipv4 != want {
			t.Errorf("%s: %v", args, ipv4)
		}
	}
}

func TestErrorsNameFileLineFieldAndValue(t *testing.T) {
	for _, tc := range []struct{ content, want string }{
		{"mode: nftable\n", `:3: mode: "nftable": must be one of "iptables", "ipvs", "nftables", ""`},
		{"nodeportAddresses: []\n", `:3: unknown field "nodeportAddresses", the nearest known is "nodePortAddresses"`},
		{"conntrack:\n  max-per-core: 1\n", `:4: unknown field "conntrack.max-per-core", the nearest known is "conntrack.maxPerCore"`},
		{"mode: nftables\nclusterCIDR: ''\nmode: ipvs\n", `:5: "mode" is there already, at line 3`},
		{"iptables:\n  syncPeriod: 30\n", `:4: iptables.syncPeriod: "30" is a number and not a time such as "30s"`},
		{"iptables:\n  syncPeriod: 30x\n", `:4: iptables.syncPeriod: "30x": time: unknown unit`},
		{"iptables:\n  syncPeriod: 500ms\n", `:3: iptables.minSyncPeriod: 1s: must not be more than iptables.syncPeriod, 500ms`},
		{"iptables:\n  syncPeriod: -1s\n", `:4: iptables.syncPeriod: -1s: must be more than 0`},
		{"nftables:\n  syncPeriod: -1s\n", `:4: nftables.syncPeriod: -1s: must be more than 0`},
		{"nftables: {minSyncPeriod: -1s}\n", `:3: nftables.minSyncPeriod: -1s: must not be negative`},
		{"oomScoreAdj: 1001\n", `:3: oomScoreAdj: 1001: must be from -1000 to 1000`},
		{"oomScoreAdj: 5000000000\n", `:3: oomScoreAdj: "5000000000" is a number 5000000000 and not a whole number of 32 bits`},
		{"enableProfiling: maybe\n", `:3: enableProfiling: "maybe" is a string and not a true or false`},
		{"conntrack: [1]\n", `:3: conntrack: a list cannot be a mapping`},
		{"bindAddress: {a: b}\n", `:3: bindAddress: a mapping cannot be a string`},
		{"nodePortAddresses: all\n", `:3: nodePortAddresses: a single value cannot be a list`},
		{"nodePortAddresses:\n- all\n- 10.0.0.0/33\n", `:5: nodePortAddresses[1]: "10.0.0.0/33": must be a CIDR`},
		{"nodePortAddresses: [primary, primary]\n", `:3: nodePortAddresses[1]: "primary": is there already`},
		{"clusterCIDR: 10.0.0.0/8,10.1.0.0/16\n", `:3: clusterCIDR: "10.0.0.0/8,10.1.0.0/16": must be a CIDR, or one of IPv4 and one of IPv6`},
		{"clusterCIDR: 10.0.0.0\n", `:3: clusterCIDR: "10.0.0.0": must be a CIDR`},
		{"bindAddress: host\n", `:3: bindAddress: "host": must be an IP address`},
		{"healthzBindAddress: 0.0.0.0:0\n", `:3: healthzBindAddress: "0.0.0.0:0": the port must be from 1 to 65535`},
		{"metricsBindAddress: localhost:1\n", `:3: metricsBindAddress: "localhost:1": "localhost" must be an IP address`},
		{"detectLocalMode: BridgeInterface\n", `detectLocal.bridgeInterface: "": must not be empty with detectLocalMode BridgeInterface`},
		{"detectLocalMode: Bridge\n", `:3: detectLocalMode: "Bridge": must be one of "ClusterCIDR"`},
		{"conntrack:\n  udpTimeout: -1s\n", `:4: conntrack.udpTimeout: -1s: must not be negative`},
		{"iptables: {masqueradeBit: 32}\n", `:3: iptables.masqueradeBit: 32: must be from 0 to 31`},
		{"clientConnection: {burst: -1}\n", `:3: clientConnection.burst: -1: must not be negative`},
		{"logging: {format: xml}\n", `:3: logging.format: "xml": must be one of "text", "json"`},
		{"featureGates: {A: 1}\n", `:3: featureGates.A: "1" is a number and not a true or false`},
		{"mode: !!str nftables\n", `:3: mode: "nftables": tags such as !!str are not known here`},
		{"mode: ''\n---\nmode: ipvs\n", `there is more than one document`},
		{"mode: [\n", `:3: did not find expected node content`},
		{"a: &a [*a]\nnodePortAddresses: *a\n", `unknown field "a"`},
		{"nodePortAddresses: &a [*a]\n", `:3: nodePortAddresses[0]: a list cannot be a string`},
	} {
		file := write(t, header+tc.content)
		_, err := Load(file)
		if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%q:\n got %v\nwant %s", tc.content, err, tc.want)
		}
	}
}

func TestKindAndVersion(t *testing.T) {
	for content, want := range map[string]string{
		"":                                "is empty",
		"[]":                              ":1: is a list and not a mapping",
		"mode: ''":                        "there is no kind: KubeProxyConfiguration",
		"kind: KubeProxyConfiguration":    "there is no apiVersion: kubeproxy.config.k8s.io/v1alpha1",
		"apiVersion: v1\nkind: ConfigMap": `:2: kind: is "ConfigMap" and not "KubeProxyConfiguration" (the configuration is what its config.conf holds)`,
		"apiVersion: kubeproxy.config.k8s.io/v1\nkind: KubeProxyConfiguration": `:1: apiVersion: is "kubeproxy.config.k8s.io/v1"`,
	} {
		if _, err := Load(write(t, content)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q:\n got %v\nwant %s", content, err, want)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that is not there was read")
	}
	if _, err := Load(write(t, header+"#"+strings.Repeat("x", maxFile))); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a huge file: %v", err)
	}
}

// Every mistake is told, not the first alone.
func TestAllMistakesAtOnce(t *testing.T) {
	_, err := Load(write(t, header+"moda: x\nconntrack: {minimum: 1}\noomScoreAdj: x\n"))
	for _, want := range []string{"moda", "conntrack.minimum", "oomScoreAdj"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %s in %v", want, err)
		}
	}
	_, err = Load(write(t, header+strings.Repeat("x: 1\n", 1000)))
	if n := strings.Count(err.Error(), "\n"); n > maxErrors {
		t.Errorf("%d lines", n)
	}
}

// What is in force is written so that it can be read: each field of the type, too.
func TestWrittenConfigurationReadsTheSame(t *testing.T) {
	for _, args := range [][]string{nil, {"--proxy-mode=nftables", "--feature-gates=A=true", "--conntrack-udp-timeout=3s", "--nodeport-addresses=all"}} {
		c := mustLoad(t, args...)
		text, err := yaml.Marshal(c.Proxy)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Load(write(t, string(text)))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		again, err := yaml.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if string(again) != string(text) {
			t.Errorf("%s\n%s", text, again)
		}
	}
}

// Beside --config the name, the API server and the level of logs count, and no other flag.
func TestPrecedenceOfFlags(t *testing.T) {
	file := write(t, header+"hostnameOverride: of-file\nclusterCIDR: 10.1.0.0/16\nclientConnection: {kubeconfig: /of/file}\n")
	c := mustLoad(t, "--config", file, "--hostname-override", " Node-1 ", "--master", "https://other", "-v", "5",
		"--cluster-cidr", "10.2.0.0/16", "--kubeconfig", "/of/flag")
	if name, err := c.NodeName(); name != "node-1" || err != nil {
		t.Errorf("name %q %v", name, err)
	}
	if c.Master != "https://other" || c.Proxy.Logging.Verbosity != 5 {
		t.Errorf("%+v", c)
	}
	if c.Proxy.ClusterCIDR != "10.1.0.0/16" || c.Proxy.ClientConnection.Kubeconfig != "/of/file" {
		t.Errorf("%+v", c.Proxy)
	}
	if got := strings.Join(c.Ignored, " "); got != "--cluster-cidr --kubeconfig" {
		t.Errorf("ignored: %s", got)
	}
	if _, err := load(t, "--config", file, "--hostname-override", "  "); err == nil {
		t.Error("an empty name was taken")
	}
}

func TestFlags(t *testing.T) {
	c := mustLoad(t, "--proxy-mode", "nftables", "--cluster-cidr", "10.1.0.0/16,fd00::/64", "--nodeport-addresses", "all,10.0.0.0/8",
		"--healthz-bind-address", "::", "--metrics-port", "0", "--iptables-sync-period", "10s", "--bind-address", "10.0.0.7",
		"--feature-gates", "AllowServiceExternalIPs=false,Other=true", "--conntrack-min", "7", "--iptables-masquerade-bit", "3")
	p := &c.Proxy
	if p.HealthzBindAddress != "[::]:10256" || p.MetricsBindAddress != "" || c.SyncPeriod() != 10*time.Second || *p.Conntrack.Min != 7 {
		t.Errorf("%+v", p)
	}
	m := c.Model("n", true, false)
	want := model.Config{
		NodeName: "n", IPv4: true, BindAddress: m.BindAddress, DetectLocal: model.ModeClusterCIDR, ClusterCIDRs: []string{"10.1.0.0/16", "fd00::/64"},
		NodePortAddresses: []string{"all", "10.0.0.0/8"}, NoExternalIPs: true,
	}
	if !reflect.DeepEqual(m, want) || m.BindAddress.String() != "10.0.0.7" {
		t.Errorf("got  %+v\nwant %+v", m, want)
	}
	if _, err := model.New(m); err != nil {
		t.Error(err)
	}
	if got := strings.Join(c.Unused(), "\n"); !strings.Contains(got, "iptables.masqueradeBit") || !strings.Contains(got, "featureGates.Other") {
		t.Errorf("unused: %s", got)
	}
}

func TestErrorsNameTheFlag(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"--proxy-mode", "ebpf"}, `--proxy-mode: "ebpf": must be one of`},
		{[]string{"--nodeport-addresses", "all,x"}, `--nodeport-addresses: "x": must be a CIDR`},
		{[]string{"--cluster-cidr", "x"}, `--cluster-cidr: "x": must be a CIDR`},
		{[]string{"--oom-score-adj", "-2000"}, `--oom-score-adj: -2000`},
		{[]string{"--iptables-sync-period", "0s", "--proxy-mode", "nftables"}, `--iptables-sync-period: 0s: must be more than 0`},
		{[]string{"--feature-gates", "A=x"}, `--feature-gates: A=x: must be true or false`},
		{[]string{"--logging-format", "x", "--config", "testdata/kubeadm.yaml"}, `--logging-format: "x"`},
		{[]string{"--detect-local-mode", "InterfaceNamePrefix"}, `--pod-interface-name-prefix: "": must not be empty`},
	} {
		if _, err := load(t, tc.args...); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q:\n got %v\nwant %s", tc.args, err, tc.want)
		}
	}
}

// Whatever is in a file: it is refused, or what it comes to is a configuration that the model takes and that reads the same.
func FuzzParse(f *testing.F) {
	kubeadm, err := os.ReadFile("testdata/kubeadm.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(kubeadm)
	for _, s := range []string{"mode: nftables\n", "nodePortAddresses: [all, 010.0.0.0/8]\n", "a: &a [*a]\n", "conntrack: {min: 1e3}\n", "logging: {vmodule: [{filePattern: a, verbosity: 1}]}\n", "<<: {mode: ipvs}\n", "mode: |\n ipvs\n"} {
		f.Add([]byte(header + s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		c, _, err := parse("f", data)
		if err != nil {
			return
		}
		setDefaults(c)
		if check(c, func(path string) string { return path }) != nil {
			return
		}
		if _, err := model.New((&Config{Proxy: *c}).Model("n", true, true)); err != nil {
			t.Fatalf("the model refuses it: %v", err)
		}
		text, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "c")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Load(file)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if again, _ := yaml.Marshal(got); string(again) != string(text) {
			t.Fatalf("%s\n%s", text, again)
		}
	})
}
