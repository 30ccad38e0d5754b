package config

import (
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/network"
	"github.com/berth-run/berth/network/routes"
)

// Config of `berth serve`. A nil or empty field of a file leaves what is; the names are those of the flags.
type Config struct {
	// Root is where what must survive a reboot is kept: images, records, writable layers.
	Root string `json:"root,omitempty"`
	// WritableRoot is where what containers write to their root file systems is kept, if it is to be on another file system
	// than the images; in Root if empty.
	WritableRoot string `json:"writableRoot,omitempty"`
	// Run is where the rest is: a tmpfs.
	Run string `json:"run,omitempty"`
	// Socket is where the CRI is served; berth.sock in Run if empty.
	Socket string `json:"socket,omitempty"`
	// CertsD holds HOST/hosts.toml for registries, in containerd's format. It may be several directories, separated by
	// colons: the first that has a registry's counts.
	CertsD string `json:"certsD,omitempty"`
	// WhenRegistryDown is what a pull does while its registry does not answer: fail, or take the image of that name that is
	// local, where there is one.
	WhenRegistryDown string `json:"whenRegistryDown,omitempty"`
	// LayerBlobs says what becomes of the compressed layers of an image once they are unpacked: drop or keep. Kept, they take
	// about half as much disk again, and images are exported byte for byte as they were pulled.
	LayerBlobs string `json:"layerBlobs,omitempty"`
	// MaxLayerBytes is how much a layer of an image may unpack to: "100Gi".
	MaxLayerBytes string `json:"maxLayerBytes,omitempty"`
	// MaxLayerEntries is how many files, directories and links it may have.
	MaxLayerEntries string `json:"maxLayerEntries,omitempty"`
	// MinPullRate is how many bytes a second a connection to a registry must bring, over half a minute: "10Ki". One that brings
	// less is given up, and another is tried.
	MinPullRate string `json:"minPullRate,omitempty"`
	// CNIConf is where the network's conflist is.
	CNIConf string `json:"cniConf,omitempty"`
	// CNIBin is where its plugins are.
	CNIBin []string `json:"cniBin,omitempty"`
	// PodCIDR is what the default network is made of, where CNIConf has no network: the ranges that the kubelet hands over,
	// or those given here, one of IPv4, one of IPv6, or both, joined by a comma. To turn it off as CadvisorSocket.
	PodCIDR string `json:"podCIDR,omitempty"`
	// NodeRoutes says how pods of other nodes are reached, where the network is the default one: off, host-gw, vxlan or auto.
	NodeRoutes string `json:"nodeRoutes,omitempty"`
	// Kubeconfig leads to the API server, for NodeRoutes.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// NodeName is the name of this node's object there; the host's name in lower case, as the kubelet has it, if empty.
	NodeName string `json:"nodeName,omitempty"`
	// CNIExec are types of CNI plugins whose programs are run although berth answers them itself; all is every one.
	CNIExec []string `json:"cniExec,omitempty"`
	// CDISpecDirs are the directories of CDI specifications, the later ones before the earlier; none turns CDI off.
	CDISpecDirs []string `json:"cdiSpecDirs,omitempty"`
	// CgroupDriver is auto (systemd where that is process 1), cgroupfs or systemd. The kubelet asks for it.
	CgroupDriver string `json:"cgroupDriver,omitempty"`
	// DefaultUlimits are NAME=SOFT:HARD, the resource limits of containers; those not named are the daemon's.
	DefaultUlimits []string `json:"defaultUlimits,omitempty"`
	// SELinux is auto, which labels pods where the kernel has SELinux on, or disabled: none is, and what pods ask for says
	// nothing.
	SELinux string `json:"selinux,omitempty"`
	// SELinuxRelabel says when a volume is relabelled that has to have a container's SELinux label: always (file by file, where
	// it differs), or once, which takes a volume whose root has the label to have it throughout.
	SELinuxRelabel string `json:"selinuxRelabel,omitempty"`
	// StreamIdle is after how long without a byte an exec, attach or port-forward is cut: "4h", "90s".
	StreamIdle string `json:"streamIdle,omitempty"`
	// CadvisorSocket is where cAdvisor, inside a kubelet, asks for containers. "disabled" turns it off and is the same as
	// empty, which is what it is once loaded.
	CadvisorSocket string `json:"cadvisorSocket,omitempty"`
	// NRISocket is where plugins of the Node Resource Interface connect to; to turn it off as CadvisorSocket.
	NRISocket string `json:"nriSocket,omitempty"`
	// NRIPlugins holds plugins that are started with the daemon.
	NRIPlugins string `json:"nriPlugins,omitempty"`
	// NRIConfig holds their configuration.
	NRIConfig string `json:"nriConfig,omitempty"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `json:"logLevel,omitempty"`
	// LogFormat is text or json.
	LogFormat string `json:"logFormat,omitempty"`
	// Shim is the berth-shim program; the one beside berth if empty.
	Shim string `json:"shim,omitempty"`
}

// Default is what holds where nobody says anything.
func Default() Config {
	return Config{
		Root:             "/var/lib/berth",
		Run:              "/run/berth",
		CertsD:           "/etc/berth/certs.d",
		WhenRegistryDown: Fail,
		LayerBlobs:       Drop,
		MaxLayerBytes:    "100Gi",
		MaxLayerEntries:  "1000000",
		MinPullRate:      "10Ki",
		CNIConf:          "/etc/cni/net.d",
		CNIBin:           []string{"/opt/cni/bin"},
		PodCIDR:          Kubelet,
		NodeRoutes:       string(routes.Off),
		CDISpecDirs:      []string{"/etc/cdi", "/var/run/cdi"},
		CgroupDriver:     "auto",
		SELinux:          "auto",
		SELinuxRelabel:   Always,
		StreamIdle:       "4h",
		CadvisorSocket:   "/run/containerd/containerd.sock",
		NRISocket:        "/var/run/nri/nri.sock",
		NRIPlugins:       "/opt/nri/plugins",
		NRIConfig:        "/etc/nri/conf.d",
		LogLevel:         "info",
		LogFormat:        "text",
	}
}

// Load merges files, in this order, and flags over the defaults, and checks the outcome. set are the values given by flags;
// its keys are names of fields as in files.
func Load(files []string, set Config, given func(name string) bool) (*Config, error) {
	c, from := Default(), origins{}
	for _, file := range files {
		layer, lines, err := readFile(file)
		if err != nil {
			return nil, err
		}
		c.lay(layer, func(name string) bool { _, ok := lines[name]; return ok })
		for name, line := range lines {
			from[name] = fmt.Sprintf("%s:%d: %s", file, line, name)
		}
	}
	c.lay(set, given)
	for _, f := range c.fields() {
		if given(f.name) {
			from[f.name] = "--" + f.flag
		}
		if f.off != "" && *f.text == f.off {
			*f.text = ""
		}
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.Run, "berth.sock")
	}
	return &c, c.check(from)
}

// field is one field of a Config.
type field struct {
	name, flag string
	text       *string            // one of both
	list       *[]string          // is set
	words      []string           // that it can be; nil: an absolute path
	parse      func(string) error // says what else it can be
	optional   bool               // may be empty
	off        string             // a word for empty: what it is for is not done
}

// Disabled turns off what is on by default.
const Disabled = "disabled"

// Kubelet has the default network made of what the kubelet hands over.
const Kubelet = "kubelet"

// What a pull does while its registry does not answer.
const (
	Fail  = "fail"
	Local = "local"
)

// What becomes of compressed layers.
const (
	Drop = "drop"
	Keep = "keep"
)

// When a volume is relabelled.
const (
	Always = "always"
	Once   = "once"
)

// fields names all fields once. A test holds that none is missing.
func (c *Config) fields() []field {
	return []field{
		{name: "root", flag: "root", text: &c.Root},
		{name: "writableRoot", flag: "writable-root", text: &c.WritableRoot, optional: true},
		{name: "run", flag: "run", text: &c.Run},
		{name: "socket", flag: "socket", text: &c.Socket, optional: true},
		{name: "certsD", flag: "certs-d", text: &c.CertsD, optional: true, parse: directories},
		{name: "whenRegistryDown", flag: "when-registry-down", text: &c.WhenRegistryDown, words: []string{Fail, Local}},
		{name: "layerBlobs", flag: "layer-blobs", text: &c.LayerBlobs, words: []string{Drop, Keep}},
		{name: "maxLayerBytes", flag: "max-layer-bytes", text: &c.MaxLayerBytes, parse: amount},
		{name: "maxLayerEntries", flag: "max-layer-entries", text: &c.MaxLayerEntries, parse: amount},
		{name: "minPullRate", flag: "min-pull-rate", text: &c.MinPullRate, parse: amount},
		{name: "cniConf", flag: "cni-conf", text: &c.CNIConf},
		{name: "cniBin", flag: "cni-bin", list: &c.CNIBin},
		{name: "podCIDR", flag: "pod-cidr", text: &c.PodCIDR, optional: true, off: Disabled, parse: podCIDR},
		{name: "nodeRoutes", flag: "node-routes", text: &c.NodeRoutes, words: routes.Modes()},
		{name: "kubeconfig", flag: "kubeconfig", text: &c.Kubeconfig, optional: true},
		{name: "nodeName", flag: "node-name", text: &c.NodeName, optional: true, parse: nodeName},
		{name: "cniExec", flag: "cni-exec", list: &c.CNIExec, optional: true, words: append([]string{network.ExecAll}, network.InProcess()...)},
		{name: "cdiSpecDirs", flag: "cdi-spec-dirs", list: &c.CDISpecDirs, optional: true},
		{name: "cgroupDriver", flag: "cgroup-driver", text: &c.CgroupDriver, words: []string{"auto", "cgroupfs", "systemd"}},
		{name: "defaultUlimits", flag: "default-ulimits", list: &c.DefaultUlimits, optional: true, parse: ulimit},
		{name: "selinux", flag: "selinux", text: &c.SELinux, words: []string{"auto", Disabled}},
		{name: "selinuxRelabel", flag: "selinux-relabel", text: &c.SELinuxRelabel, words: []string{Always, Once}},
		{name: "streamIdle", flag: "stream-idle", text: &c.StreamIdle, parse: idle},
		{name: "cadvisorSocket", flag: "cadvisor-socket", text: &c.CadvisorSocket, optional: true, off: Disabled},
		{name: "nriSocket", flag: "nri-socket", text: &c.NRISocket, optional: true, off: Disabled},
		{name: "nriPlugins", flag: "nri-plugins", text: &c.NRIPlugins, optional: true},
		{name: "nriConfig", flag: "nri-config", text: &c.NRIConfig, optional: true},
		{name: "logLevel", flag: "log-level", text: &c.LogLevel, words: []string{"debug", "info", "warn", "error"}},
		{name: "logFormat", flag: "log-format", text: &c.LogFormat, words: []string{"text", "json"}},
		{name: "shim", flag: "shim", text: &c.Shim, optional: true},
	}
}

// Values are the values of all fields by name, also of those that are empty.
func (c *Config) Values() map[string]any {
	all := map[string]any{}
	for _, f := range c.fields() {
		if f.text != nil {
			all[f.name] = *f.text
		} else {
			all[f.name] = append([]string{}, *f.list...) // none is [], not null
		}
	}
	return all
}

// Flag is the flag of a field of that name.
func Flag(name string) string {
	c := Config{}
	for _, f := range c.fields() {
		if f.name == name {
			return f.flag
		}
	}
	return ""
}

// lay takes the fields of over that are given.
func (c *Config) lay(over Config, given func(name string) bool) {
	below, above := c.fields(), over.fields()
	for i, f := range below {
		switch {
		case !given(f.name):
		case f.text != nil:
			*f.text = *above[i].text
		default:
			*f.list = slices.Clone(*above[i].list)
		}
	}
}

// origins says where each field was given, for errors; a default says so by its name alone.
type origins map[string]string

func (o origins) of(name string) string {
	if at, ok := o[name]; ok {
		return at
	}
	return name
}

// check refuses values that cannot work.
func (c *Config) check(from origins) error {
	for _, f := range c.fields() {
		values := []string{}
		if f.text != nil {
			values = append(values, *f.text)
		} else {
			values = append(values, *f.list...)
			if len(values) == 0 && !f.optional {
				return fmt.Errorf("%s: must not be empty", from.of(f.name))
			}
		}
		for _, v := range values {
			if err := f.check(v); err != nil {
				return fmt.Errorf("%s: %w", from.of(f.name), err)
			}
		}
	}
	if c.NodeRoutes != string(routes.Off) && c.Kubeconfig == "" {
		return fmt.Errorf("%s: %s needs a kubeconfig (--kubeconfig) that may list and watch Nodes", from.of("nodeRoutes"), c.NodeRoutes)
	}
	// One inside the other would have a reboot, or a removal, take what it must not.
	if c.Root == c.Run || within(c.Root, c.Run) || within(c.Run, c.Root) {
		return fmt.Errorf("%s: %q: must be neither inside nor around root %q", from.of("run"), c.Run, c.Root)
	}
	return nil
}

func (f field) check(v string) error {
	switch {
	case v == "" && f.optional, v != "" && v == f.off:
		return nil
	case v == "":
		return fmt.Errorf("must not be empty")
	case f.parse != nil:
		return f.parse(v)
	case f.words != nil:
		if !slices.Contains(f.words, v) {
			return fmt.Errorf("%q is none of %s", v, strings.Join(f.words, ", "))
		}
	case !filepath.IsAbs(v) || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%q is not an absolute path", v)
	}
	return nil
}

// directories says what is wrong with paths separated by colons.
func directories(s string) error {
	for _, dir := range filepath.SplitList(s) {
		if err := (field{}).check(dir); err != nil {
			return err
		}
	}
	return nil
}

func ulimit(s string) error {
	_, err := spec.ParseRlimit(s)
	return err
}

func podCIDR(s string) error {
	if s == Kubelet {
		return nil
	}
	_, err := network.ParsePodCIDRs(s)
	return err
}

// nodeName says what is wrong with the name of a node: names of objects are those of DNS.
func nodeName(s string) error {
	if errs := validation.IsDNS1123Subdomain(s); len(errs) > 0 {
		return fmt.Errorf("%q is no name of a node: %s", s, errs[0])
	}
	return nil
}

// PodCIDRs are the ranges that PodCIDR gives, which Load has checked; none where it gives a word.
func (c *Config) PodCIDRs() []netip.Prefix {
	if c.PodCIDR == Kubelet {
		return nil
	}
	cidrs, _ := network.ParsePodCIDRs(c.PodCIDR)
	return cidrs
}

// idle says what is wrong with a time of silence. A second is less than people pause for.
func idle(s string) error {
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return fmt.Errorf("%q is no duration such as 4h or 90s", s)
	case d < time.Second:
		return fmt.Errorf("%q is less than a second", s)
	}
	return nil
}

// Idle is StreamIdle, which Load has checked.
func (c *Config) Idle() time.Duration {
	d, _ := time.ParseDuration(c.StreamIdle)
	return d
}

// amount says what is wrong with a number.
func amount(s string) error {
	if Amount(s) < 1 {
		return fmt.Errorf("%q is no number such as 1000000, 512Mi or 100Gi", s)
	}
	return nil
}

// Amount is the number that a text means, as Kubernetes writes it; 0 if it means none.
func Amount(s string) int64 {
	digits, shift := s, 0
	for i, unit := range []string{"Ki", "Mi", "Gi", "Ti"} {
		if rest, ok := strings.CutSuffix(s, unit); ok {
			digits, shift = rest, 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>20>>shift { // what is computed from it must fit, too
		return 0
	}
	return n << shift
}

// WritableStore is the directory in WritableRoot that is berth's alone; "" if there is none.
func (c *Config) WritableStore() string {
	if c.WritableRoot == "" {
		return ""
	}
	return filepath.Join(c.WritableRoot, "writable")
}

// AdminSocket is where operators' tools reach the daemon, in a directory of its own: that of Run is passed through by others.
func (c *Config) AdminSocket() string { return filepath.Join(c.Run, "admin", "admin.sock") }

func within(inner, outer string) bool {
	rel, err := filepath.Rel(outer, inner)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}
