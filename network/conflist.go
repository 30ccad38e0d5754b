package network

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

// maxConf bounds a configuration file.
const maxConf = 1 << 20

// conflist is a network configuration that is complete in itself: plugins of further files are in its bytes.
type conflist struct {
	*libcni.NetworkConfigList
	file  string         // where it came from, for errors
	cidrs []netip.Prefix // where it is the default network's instead
	ports *tablePorts    // host ports are not made by a plugin, but as this says
}

func (c *conflist) byDefault() bool { return len(c.cidrs) > 0 }

// from says where it came from.
func (c *conflist) from() string {
	if c.byDefault() {
		return "pod CIDR " + joinCIDRs(c.cidrs)
	}
	return c.file
}

// same says whether both are the same, or none.
func (c *conflist) same(o *conflist) bool {
	if c == nil || o == nil {
		return c == o
	}
	return c.from() == o.from() && string(c.Bytes) == string(o.Bytes)
}

var errNoConfiguration = errors.New("no network configuration")

// loadDir reads the first configuration of dir, in lexical order of the file names.
func loadDir(dir string) (*conflist, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("network configuration: %w", err)
	}
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conflist", ".conf", ".json":
		default:
			continue
		}
		file := filepath.Join(dir, e.Name())
		c, err := loadFile(file)
		if err != nil {
			return nil, fmt.Errorf("network configuration %w", inFile(file, err))
		}
		if len(c.Plugins) == 1 && c.Plugins[0].Network.Type == "loopback" {
			continue // a file for runtimes that do not set up lo themselves
		}
		return c, nil
	}
	return nil, fmt.Errorf("%w (*.conflist, *.conf, *.json) in %s", errNoConfiguration, dir)
}

func loadFile(file string) (*conflist, error) {
	data, err := readBounded(file)
	if err != nil {
		return nil, err
	}
	c, err := parseConflist(data, func(network string) ([][]byte, error) { return readPlugins(filepath.Join(filepath.Dir(file), network)) })
	if err != nil {
		return nil, err
	}
	c.file = file
	return c, nil
}

// readPlugins reads the files from which a list may take plugins that are not in it (CNI 1.1).
func readPlugins(dir string) ([][]byte, error) {
	files, err := libcni.ConfFiles(dir, []string{".conf"})
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	var all [][]byte
	for _, file := range files {
		data, err := readBounded(file)
		if err == nil {
			err = checkPlugin(data)
		}
		if err != nil {
			return nil, inFile(file, err)
		}
		all = append(all, data)
	}
	return all, nil
}

// readBounded reads a regular file and does not wait for the writer of a fifo.
func readBounded(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConf {
		return nil, fmt.Errorf("larger than %d bytes", maxConf)
	}
	return data, nil
}

// parseConflist reads a list, or a single plugin's configuration as a list of one. further, if not nil, finds plugins of
// that network outside of the list.
func parseConflist(data []byte, further func(network string) ([][]byte, error)) (*conflist, error) {
	var top struct {
		CNIVersion string            `json:"cniVersion"`
		Name       string            `json:"name"`
		Type       string            `json:"type"`
		Plugins    []json.RawMessage `json:"plugins"`
		Ports      *tablePorts       `json:"berthHostPorts"`
	}
	if err := json.Unmarshal(data, &top); err != nil {
		return nil, inLine(lineOf(data, err), fmt.Errorf("not a configuration: %w", err))
	}
	at := linesOf(data)
	if err := checkName(top.Name); err != nil { // before it becomes a part of paths
		return nil, inLine(cmp.Or(at.key("name"), 1), err)
	}
	for i, p := range top.Plugins {
		if err := checkPlugin(p); err != nil {
			return nil, inLine(at.plugin(i), fmt.Errorf("plugin %d: %w", i+1, err))
		}
	}
	if top.Plugins == nil && top.Type != "" {
		if err := checkPlugin(data); err != nil {
			return nil, err
		}
		list := map[string]any{"name": top.Name, "cniVersion": top.CNIVersion, "plugins": []json.RawMessage{data}}
		var err error
		if data, err = json.Marshal(list); err != nil {
			return nil, err
		}
		further = nil
	} else if line := at.key("plugins"); line > 0 && len(top.Plugins) == 0 {
		return nil, inLine(line, fmt.Errorf("network %s has no plugins", top.Name))
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	if err := checkVersion(list); err != nil {
		return nil, inLine(at.key("cniVersion"), err)
	}
	if further != nil && !list.LoadOnlyInlinedPlugins {
		if list, err = inline(list, data, top.Plugins, further); err != nil {
			return nil, err
		}
	}
	if len(list.Plugins) == 0 {
		return nil, inLine(1, fmt.Errorf("network %s has no plugins", list.Name))
	}
	for _, typ := range types(list) { // those of further files, too
		if err := validType(typ); err != nil {
			return nil, err
		}
	}
	return &conflist{NetworkConfigList: list, ports: top.Ports}, nil
}

// checkName says what is wrong with the name of a network.
func checkName(name string) error {
	if name == "" {
		return errors.New("name is missing")
	}
	if err := utils.ValidateNetworkName(name); err != nil {
		return fmt.Errorf("name %q: %s", name, err.Msg)
	}
	return nil
}

// checkPlugin says what is wrong with the configuration of one plugin.
func checkPlugin(data []byte) error {
	p, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return inLine(lineOf(data, err), err)
	}
	if err := validType(p.Network.Type); err != nil {
		return err
	}
	if p.Network.IPAM.Type == "" {
		return nil
	}
	if err := validType(p.Network.IPAM.Type); err != nil {
		return fmt.Errorf("%s: ipam: %w", p.Network.Type, err)
	}
	return nil
}

// inline puts plugins of further files into the list, so that its bytes alone are enough to tear down what it set up.
func inline(list *libcni.NetworkConfigList, data []byte, plugins []json.RawMessage, further func(string) ([][]byte, error)) (*libcni.NetworkConfigList, error) {
	more, err := further(list.Name)
	if err != nil || len(more) == 0 {
		return list, err
	}
	whole := map[string]json.RawMessage{}
	if err := json.Unmarshal(data, &whole); err != nil {
		return nil, err
	}
	for _, m := range more {
		if !json.Valid(m) {
			return nil, fmt.Errorf("plugin configuration of network %s is not JSON", list.Name)
		}
		plugins = append(plugins, m)
	}
	if whole["plugins"], err = json.Marshal(plugins); err != nil {
		return nil, err
	}
	whole["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	if data, err = json.Marshal(whole); err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(data)
}

func checkVersion(list *libcni.NetworkConfigList) error {
	v := list.CNIVersion
	if v == "" {
		v = "0.1.0" // as the specification says
	}
	if all := version.All.SupportedVersions(); !slices.Contains(all, v) {
		return fmt.Errorf("network %s: CNI version %q is none of %s", list.Name, v, strings.Join(all, ", "))
	}
	return nil
}

// types lists the plugins that a network runs, with those that plugins run for addresses.
func types(list *libcni.NetworkConfigList) []string {
	var all []string
	for _, p := range list.Plugins {
		all = append(all, p.Network.Type)
		if p.Network.IPAM.Type != "" {
			all = append(all, p.Network.IPAM.Type)
		}
	}
	return all
}

// validType keeps types from being paths: a file outside of the plugin directories would be run as root
// (CVE-2021-20206). Plugins built with old libraries do not check the type of their IPAM plugin.
func validType(typ string) error {
	if typ == "" || typ[0] == '.' || len(typ) > 255 || strings.ContainsRune(typ, '/') || hasControl(typ) {
		return fmt.Errorf("plugin type %q is not a file name", typ)
	}
	return nil
}

// capable says whether a plugin of the list takes that capability.
func (c *conflist) capable(name string) bool {
	return slices.ContainsFunc(c.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[name] })
}
