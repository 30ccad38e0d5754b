package config

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"
)

// Flags are kube-proxy's, by their names. Add adds them, Load reads what was given.
type Flags struct {
	// Cleanup asks for removal of rules instead of a proxy.
	Cleanup bool
	// InitOnly asks for what wants more rights than a proxy has, instead of one.
	InitOnly bool
	// WriteConfigTo is a file to write the configuration to instead.
	WriteConfigTo string

	set      *pflag.FlagSet
	file     string
	master   string
	hostname string
	c        *v1alpha1.KubeProxyConfiguration

	bind, cidrs             string
	healthPort, metricsPort int32
	iptables, ipvs          struct{ period, least time.Duration }
	masqueradeAll           bool
	verbosity               uint32
	gates                   map[string]string
	paths                   map[string]string // flags by the path of what they set
}

const fileWins = "; does not count beside --config"

// Add adds the flags to a set.
func (f *Flags) Add(set *pflag.FlagSet) {
	f.set, f.c, f.paths = set, Default(), map[string]string{}
	c := f.c
	set.StringVar(&f.file, "config", "", "`file` with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), as in kubeadm's ConfigMap")
	set.StringVar(&f.WriteConfigTo, "write-config-to", "", "`file` to write the configuration in force to, and end")
	set.BoolVar(&f.InitOnly, "init-only", false, "set what only root may, and end: the proxy needs CAP_NET_ADMIN alone then, and no /proc/sys that it can write to")
	set.BoolVar(&f.Cleanup, "cleanup", false, "remove the rules of berth and of a former kube-proxy, and end")
	set.StringVar(&f.hostname, "hostname-override", "", "`name` of the Node this is (default the host's name)")
	set.StringVar(&f.master, "master", "", "`address` of the API server, instead of the kubeconfig's")
	set.Uint32VarP(&f.verbosity, "v", "v", 0, "`level` of what is logged: 4 and more is debug")
	f.paths["logging.format"], f.paths["logging.verbosity"] = "logging-format", "v"
	set.StringVar(&c.Logging.Format, "logging-format", c.Logging.Format, "`format` of logs: text or json")
	const noEffect = "no effect"
	set.DurationVar(&c.Logging.FlushFrequency.Duration.Duration, "log-flush-frequency", c.Logging.FlushFrequency.Duration.Duration, noEffect)
	set.Var(logsapi.VModuleConfigurationPflag(&c.Logging.VModule), "vmodule", noEffect)
	set.BoolVar(&c.Logging.Options.Text.SplitStream, "log-text-split-stream", false, noEffect)
	set.Var(&c.Logging.Options.Text.InfoBufferSize, "log-text-info-buffer-size", noEffect)
	set.BoolVar(&c.Logging.Options.JSON.SplitStream, "log-json-split-stream", false, noEffect)
	set.Var(&c.Logging.Options.JSON.InfoBufferSize, "log-json-info-buffer-size", noEffect)

	f.text(&c.ClientConnection.Kubeconfig, "kubeconfig", "clientConnection.kubeconfig", "`file` that says how to reach the API server (default that of the pod)")
	f.text(&c.ClientConnection.ContentType, "kube-api-content-type", "clientConnection.contentType", "content `type` of requests")
	f.number(&c.ClientConnection.Burst, "kube-api-burst", "clientConnection.burst", "`requests` at once to the API server")
	set.Float32Var(&c.ClientConnection.QPS, "kube-api-qps", c.ClientConnection.QPS, f.named("kube-api-qps", "clientConnection.qps", "`requests` a second to the API server"))
	f.text((*string)(&c.Mode), "proxy-mode", "mode", "`mode`: nftables, which is the default where the kernel has it, or iptables")
	f.text(&f.bind, "bind-address", "bindAddress", "`address` of the node, instead of its Node's; nothing is bound to it")
	f.text(&c.HealthzBindAddress, "healthz-bind-address", "healthzBindAddress", "`address` of /healthz and /livez")
	f.number(&f.healthPort, "healthz-port", "", "port of --healthz-bind-address where it has none, 0 for no server")
	f.text(&c.MetricsBindAddress, "metrics-bind-address", "metricsBindAddress", "`address` of /metrics, /configz and /proxyMode")
	f.number(&f.metricsPort, "metrics-port", "", "port of --metrics-bind-address where it has none, 0 for no server")
	f.healthPort, f.metricsPort = HealthPort, MetricsPort
	_ = set.MarkDeprecated("healthz-port", "use --healthz-bind-address")
	_ = set.MarkDeprecated("metrics-port", "use --metrics-bind-address")
	f.flag(&c.BindAddressHardFail, "bind-address-hard-fail", "bindAddressHardFail", "end where a port for health or metrics is taken")
	f.flag(&c.EnableProfiling, "profiling", "enableProfiling", "serve /debug/pprof beside /metrics")
	f.text(&c.ShowHiddenMetricsForVersion, "show-hidden-metrics-for-version", "showHiddenMetricsForVersion", "no effect")
	set.StringToStringVar(&f.gates, "feature-gates", nil, f.named("feature-gates", "featureGates", "feature `gates`: AllowServiceExternalIPs=false"))

	f.flag(&f.masqueradeAll, "masquerade-all", "iptables.masqueradeAll", "give all packets to cluster IPs the node's address")
	f.text((*string)(&c.DetectLocalMode), "detect-local-mode", "detectLocalMode", "`how` packets of pods are told: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix")
	f.text(&f.cidrs, "cluster-cidr", "clusterCIDR", "`range` of pods' addresses, or one of each family with a comma between")
	f.text(&c.DetectLocal.BridgeInterface, "pod-bridge-interface", "detectLocal.bridgeInterface", "`name` of the pods' bridge")
	f.text(&c.DetectLocal.InterfaceNamePrefix, "pod-interface-name-prefix", "detectLocal.interfaceNamePrefix", "`prefix` of the names of the pods' interfaces")
	set.StringSliceVar(&c.NodePortAddresses, "nodeport-addresses", nil, f.named("nodeport-addresses", "nodePortAddresses",
		"`where` node ports are served: CIDRs, primary, localhost or all, separated by commas (default all, with --proxy-mode nftables primary)"))

	f.number(c.OOMScoreAdj, "oom-score-adj", "oomScoreAdj", "`score` from -1000 to 1000 by which the kernel picks whom it kills for memory")
	f.number(c.Conntrack.MaxPerCore, "conntrack-max-per-core", "conntrack.maxPerCore", "`connections` tracked per processor, 0 to leave it")
	f.number(c.Conntrack.Min, "conntrack-min", "conntrack.min", "`connections` tracked at least")
	f.time(&c.Conntrack.TCPEstablishedTimeout.Duration, "conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout", "`time` after which an idle TCP connection is forgotten, 0 to leave it")
	f.time(&c.Conntrack.TCPCloseWaitTimeout.Duration, "conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout", "`time` for one in CLOSE_WAIT, 0 to leave it")
	f.flag(&c.Conntrack.TCPBeLiberal, "conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal", "track packets outside of the window, too")
	f.time(&c.Conntrack.UDPTimeout.Duration, "conntrack-udp-timeout", "conntrack.udpTimeout", "`time` for UDP without an answer, 0 to leave it")
	f.time(&c.Conntrack.UDPStreamTimeout.Duration, "conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout", "`time` for UDP with answers, 0 to leave it")
	f.time(&c.ConfigSyncPeriod.Duration, "config-sync-period", "configSyncPeriod", "no effect")

	f.number(c.IPTables.MasqueradeBit, "iptables-masquerade-bit", "iptables.masqueradeBit", "`bit` of packets' marks that has them masqueraded, for mode iptables alone")
	f.flag(c.IPTables.LocalhostNodePorts, "iptables-localhost-nodeports", "iptables.localhostNodePorts", "serve node ports at 127.0.0.1, too, for --proxy-mode iptables, or none")
	f.iptables.period, f.iptables.least = c.IPTables.SyncPeriod.Duration, c.IPTables.MinSyncPeriod.Duration
	f.time(&f.iptables.period, "iptables-sync-period", "iptables.syncPeriod", "`time` after which the kernel's rules are looked at although nothing has changed")
	f.time(&f.iptables.least, "iptables-min-sync-period", "iptables.minSyncPeriod", "no effect")
	f.ipvs.period = c.IPVS.SyncPeriod.Duration
	f.time(&f.ipvs.period, "ipvs-sync-period", "ipvs.syncPeriod", "for mode ipvs alone")
	f.time(&f.ipvs.least, "ipvs-min-sync-period", "ipvs.minSyncPeriod", "for mode ipvs alone")
	f.text(&c.IPVS.Scheduler, "ipvs-scheduler", "ipvs.scheduler", "for mode ipvs alone")
	set.StringSliceVar(&c.IPVS.ExcludeCIDRs, "ipvs-exclude-cidrs", nil, f.named("ipvs-exclude-cidrs", "ipvs.excludeCIDRs", "for mode ipvs alone"))
	f.flag(&c.IPVS.StrictARP, "ipvs-strict-arp", "ipvs.strictARP", "for mode ipvs alone")
	f.time(&c.IPVS.TCPTimeout.Duration, "ipvs-tcp-timeout", "ipvs.tcpTimeout", "for mode ipvs alone")
	f.time(&c.IPVS.TCPFinTimeout.Duration, "ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout", "for mode ipvs alone")
	f.time(&c.IPVS.UDPTimeout.Duration, "ipvs-udp-timeout", "ipvs.udpTimeout", "for mode ipvs alone")
}

// named notes what a flag sets, and says that it does not count beside --config.
func (f *Flags) named(name, path, help string) string {
	if path != "" {
		f.paths[path] = name
	}
	return help + fileWins
}

func (f *Flags) text(v *string, name, path, help string) {
	f.set.StringVar(v, name, *v, f.named(name, path, help))
}

func (f *Flags) number(v *int32, name, path, help string) {
	f.set.Int32Var(v, name, *v, f.named(name, path, help))
}

func (f *Flags) flag(v *bool, name, path, help string) {
	f.set.BoolVar(v, name, *v, f.named(name, path, help))
}

func (f *Flags) time(v *time.Duration, name, path, help string) {
	f.set.DurationVar(v, name, *v, f.named(name, path, help))
}

// Load is the configuration in force: that of --config, or else that of the flags.
func (f *Flags) Load() (*Config, error) {
	c := &Config{Master: f.master, File: f.file}
	var err error
	if f.file != "" {
		err = f.fromFile(c)
	} else {
		err = f.fromFlags(c)
	}
	if err != nil {
		return nil, err
	}
	if f.set.Changed("hostname-override") {
		name := strings.ToLower(strings.TrimSpace(f.hostname))
		if name == "" && f.hostname != "" {
			return nil, fmt.Errorf("--hostname-override: %q is empty", f.hostname)
		} else if name != "" {
			c.Proxy.HostnameOverride = name
		}
	}
	return c, nil
}

// fromFile has the file count, and flags for logs over it, as kube-proxy does.
func (f *Flags) fromFile(c *Config) error {
	p, localhost, modeAt, err := loadFile(f.file)
	if err != nil {
		return err
	}
	c.localhost, c.modeAt = localhost, modeAt
	if f.set.Changed("v") {
		p.Logging.Verbosity = logsapi.VerbosityLevel(f.verbosity)
	}
	if f.set.Changed("logging-format") {
		p.Logging.Format = f.c.Logging.Format
	}
	c.Proxy = *p
	f.set.Visit(func(given *pflag.Flag) {
		if strings.HasSuffix(given.Usage, fileWins) {
			c.Ignored = append(c.Ignored, "--"+given.Name)
		}
	})
	return check(p, func(path string) string {
		return "--" + map[string]string{"logging.format": "logging-format", "logging.verbosity": "v"}[path]
	})
}

// fromFlags makes a configuration of what was given.
func (f *Flags) fromFlags(c *Config) error {
	p := f.c
	given := f.set.Changed
	var errs error
	if given("bind-address") && f.bind != "" {
		p.BindAddress = f.bind
	}
	if given("cluster-cidr") {
		p.ClusterCIDR = f.cidrs
	}
	if given("masquerade-all") {
		p.IPTables.MasqueradeAll, p.NFTables.MasqueradeAll = f.masqueradeAll, f.masqueradeAll
	}
	p.NFTables.MasqueradeBit = p.IPTables.MasqueradeBit
	p.HealthzBindAddress = withPort(p.HealthzBindAddress, f.healthPort)
	p.MetricsBindAddress = withPort(p.MetricsBindAddress, f.metricsPort)
	// The flags of iptables are those of nftables as well: kube-proxy has one period for all modes but IPVS.
	p.IPTables.SyncPeriod.Duration, p.IPTables.MinSyncPeriod.Duration = f.iptables.period, f.iptables.least
	p.NFTables.SyncPeriod, p.NFTables.MinSyncPeriod = p.IPTables.SyncPeriod, p.IPTables.MinSyncPeriod
	p.IPVS.SyncPeriod.Duration, p.IPVS.MinSyncPeriod.Duration = f.ipvs.period, f.ipvs.least
	for gate, text := range f.gates {
		on, err := strconv.ParseBool(text)
		if err != nil {
			errs = fmt.Errorf("--feature-gates: %s=%s: must be true or false", gate, text)
			continue
		}
		if p.FeatureGates == nil {
			p.FeatureGates = map[string]bool{}
		}
		p.FeatureGates[gate] = on
	}
	p.Logging.Verbosity = logsapi.VerbosityLevel(f.verbosity)
	if p.DetectLocalMode == "" {
		p.DetectLocalMode = Default().DetectLocalMode
	}
	if p.Mode == NFTables && len(p.NodePortAddresses) == 0 {
		p.NodePortAddresses = []string{"primary"}
	}
	if errs != nil {
		return errs
	}
	c.modeAt = "--proxy-mode"
	c.localhost = given("iptables-localhost-nodeports") && *p.IPTables.LocalhostNodePorts
	c.Proxy = *p
	return check(p, func(path string) string {
		at := strings.Replace(path, "nftables.", "iptables.", 1)
		at, _, _ = strings.Cut(at, "[")
		if name, ok := f.paths[at]; ok {
			return "--" + name
		}
		return path
	})
}

// withPort is an address with a port, which a flag of its own may give; none with port 0.
func withPort(address string, port int32) string {
	if port == 0 {
		return ""
	}
	if netutils.ParseIPSloppy(address) != nil {
		return net.JoinHostPort(address, strconv.Itoa(int(port)))
	}
	return address
}
