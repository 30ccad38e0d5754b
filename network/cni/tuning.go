package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func init() {
	plugins["tuning"] = plugin{versions: version.All, add: tuningAdd, del: tuningDel, check: tuningCheck}
}

// tuningConf is the configuration of the tuning plugin.
type tuningConf struct {
	types.PluginConf
	DataDir  string            `json:"dataDir"`
	SysCtl   map[string]string `json:"sysctl"`
	Mac      string            `json:"mac"`
	Promisc  bool              `json:"promisc"`
	Mtu      int               `json:"mtu"`
	TxQLen   *int              `json:"txQLen"`
	Allmulti *bool             `json:"allmulti"`

	RuntimeConfig macConf `json:"runtimeConfig"`
	Args          struct {
		CNI struct {
			SysCtl   map[string]string `json:"sysctl"`
			Mac      *string           `json:"mac"`
			Promisc  *bool             `json:"promisc"`
			Mtu      *int              `json:"mtu"`
			Allmulti *bool             `json:"allmulti"`
			TxQLen   *int              `json:"txQLen"`
		} `json:"cni"`
	} `json:"args"`
}

func loadTuningConf(data []byte, args string) (*tuningConf, error) {
	c := &tuningConf{DataDir: "/run/cni/tuning"}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("failed to load netconf: %v", err)
	}
	mac, err := macOf(args)
	if err != nil {
		return nil, err
	}
	for _, m := range []string{mac, c.RuntimeConfig.Mac} {
		if m != "" {
			c.Mac = m
		}
	}
	a := c.Args.CNI
	if len(a.SysCtl) > 0 && c.SysCtl == nil {
		c.SysCtl = map[string]string{}
	}
	maps.Copy(c.SysCtl, a.SysCtl)
	override(&c.Mac, a.Mac)
	override(&c.Promisc, a.Promisc)
	override(&c.Mtu, a.Mtu)
	if a.Allmulti != nil {
		c.Allmulti = a.Allmulti
	}
	if a.TxQLen != nil {
		c.TxQLen = a.TxQLen
	}
	return c, nil
}

func override[T any](v *T, by *T) {
	if by != nil {
		*v = *by
	}
}

// uniqueSysctls refuses a configuration that has a setting twice, of which JSON keeps one.
func uniqueSysctls(data []byte) error {
	var c struct {
		SysCtl map[string]string `json:"sysctl"`
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	var raw struct {
		SysCtl json.RawMessage `json:"sysctl"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return err
	}
	keys := map[string]bool{}
	d := json.NewDecoder(bytes.NewReader(raw.SysCtl))
	for isKey := false; ; isKey = !isKey {
		t, err := d.Token()
		if err != nil {
			return nil //nolint:nilerr // the end: it is valid
		}
		if key, ok := t.(string); ok && isKey {
			if keys[key] {
				return errors.New("duplicated sysctl keys are not allowed")
			}
			keys[key] = true
		}
	}
}

// tuningAllowlist has an expression a line; one of them has to match a setting. Without the file all may be set.
const tuningAllowlist = "/etc/cni/tuning/allowlist.conf"

func (c *tuningConf) allowed() error {
	data, err := os.ReadFile(tuningAllowlist)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	list := []string{}
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" {
			list = append(list, line)
		}
	}
	for name := range c.SysCtl {
		if ok, err := matchesAny(name, list); err != nil {
			return err
		} else if !ok {
			return fmt.Errorf("Sysctl %s is not allowed. Only the following sysctls are allowed: %+v", name, list)
		}
	}
	return nil
}

func matchesAny(s string, expressions []string) (bool, error) {
	for _, e := range expressions {
		if ok, err := regexp.MatchString(e, s); err != nil || ok {
			return ok, err
		}
	}
	return false, nil
}

// sysctlFile is the file of a setting, in which IFNAME stands for the pod's interface. It has to be one of the network.
func sysctlFile(name, ifName string) (string, error) {
	name = strings.Replace(strings.ReplaceAll(name, ".", "/"), "IFNAME", ifName, 1)
	file := filepath.Join("/proc/sys", name)
	if !strings.HasPrefix(file, "/proc/sys/net/") {
		return "", fmt.Errorf("invalid net sysctl key: %q", name)
	}
	return file, nil
}

// linkTuning is what of an interface is changed, and what it was before, as the reference plugin keeps it.
type linkTuning struct {
	Mac      string `json:"mac,omitempty"`
	Promisc  *bool  `json:"promisc,omitempty"`
	Mtu      int    `json:"mtu,omitempty"`
	Allmulti *bool  `json:"allmulti,omitempty"`
	TxQLen   *int   `json:"txQLen,omitempty"`
}

func (c *tuningConf) link() linkTuning {
	t := linkTuning{Mac: c.Mac, Mtu: c.Mtu, Allmulti: c.Allmulti, TxQLen: c.TxQLen}
	if c.Promisc {
		t.Promisc = &c.Promisc
	}
	return t
}

// before is what an interface has of what is to be changed.
func (t linkTuning) before(l netlink.Link) linkTuning {
	a := l.Attrs()
	var was linkTuning
	if t.Mac != "" {
		was.Mac = a.HardwareAddr.String()
	}
	if t.Promisc != nil {
		promisc := a.Promisc != 0
		was.Promisc = &promisc
	}
	if t.Mtu != 0 {
		was.Mtu = a.MTU
	}
	if t.Allmulti != nil {
		allmulti := a.RawFlags&unix.IFF_ALLMULTI != 0
		was.Allmulti = &allmulti
	}
	if t.TxQLen != nil {
		was.TxQLen = &a.TxQLen
	}
	return was
}

// change is one of an interface.
type change struct {
	what string
	do   func(netlink.Link) error
}

// changes are those to be made, the MAC address first as in ADD of the reference plugin, or the MTU as in its DEL.
func (t linkTuning) changes(mtuFirst bool) []change {
	var all []change
	add := func(wanted bool, what string, do func(netlink.Link) error) {
		if wanted {
			all = append(all, change{what, do})
		}
	}
	mtu := func() {
		add(t.Mtu != 0, "MTU", func(l netlink.Link) error { return netlink.LinkSetMTU(l, t.Mtu) })
	}
	if mtuFirst {
		mtu()
	}
	add(t.Mac != "", "MAC address", func(l netlink.Link) error {
		mac, err := net.ParseMAC(t.Mac)
		if err != nil {
			return fmt.Errorf("invalid args %v for MAC addr: %v", t.Mac, err)
		}
		return netlink.LinkSetHardwareAddr(l, mac)
	})
	add(t.Promisc != nil, "promiscuous mode", func(l netlink.Link) error {
		if *t.Promisc {
			return netlink.SetPromiscOn(l)
		}
		return netlink.SetPromiscOff(l)
	})
	if !mtuFirst {
		mtu()
	}
	add(t.Allmulti != nil, "all-multicast mode", func(l netlink.Link) error {
		if *t.Allmulti {
			return netlink.LinkSetAllmulticastOn(l)
		}
		return netlink.LinkSetAllmulticastOff(l)
	})
	add(t.TxQLen != nil, "transmit queue length", func(l netlink.Link) error { return netlink.LinkSetTxQLen(l, *t.TxQLen) })
	return all
}

func tuningAdd(c *call) error {
	if err := uniqueSysctls(c.config); err != nil {
		return err
	}
	conf, err := loadTuningConf(c.config, c.args)
	if err != nil {
		return configError{err}
	}
	if err := conf.allowed(); err != nil {
		return err
	}
	if conf.RawPrevResult == nil {
		return errors.New("Required prevResult missing")
	}
	if err := version.ParsePrevResult(&conf.PluginConf); err != nil {
		return err
	}
	if err := insidePath(c.netns, func() error { return c.tune(conf) }); err != nil {
		return err
	}
	if conf.Mac == "" {
		return c.print(conf.PrevResult, conf.CNIVersion)
	}
	result, err := types100.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return err
	}
	for _, i := range result.Interfaces {
		if i.Name == c.ifName {
			i.Mac = conf.Mac
		}
	}
	return c.print(result, conf.CNIVersion)
}

// tune runs in the pod's namespace.
func (c *call) tune(conf *tuningConf) error {
	for name, value := range conf.SysCtl {
		file, err := sysctlFile(name, c.ifName)
		if err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
			return err
		}
	}
	t := conf.link()
	changes := t.changes(false)
	if len(changes) == 0 {
		return nil
	}
	l, err := netlinksafe.LinkByName(c.ifName)
	if err != nil {
		return fmt.Errorf("failed to get %q: %v", c.ifName, err)
	}
	if err := c.keepTuning(conf.DataDir, t.before(l)); err != nil {
		return err
	}
	for _, change := range changes {
		if err := change.do(l); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) tuningFile(dir string) string {
	return filepath.Join(dir, c.containerID+"_"+c.ifName+".json")
}

// keepTuning keeps what an interface was like.
func (c *call) keepTuning(dir string, was linkTuning) error {
	if err := os.MkdirAll(dir, 0o600); err != nil {
		return fmt.Errorf("failed to create backup directory: %v", err)
	}
	data, err := json.MarshalIndent(was, "", " ")
	if err != nil {
		return fmt.Errorf("failed to marshall data for %q: %v", c.ifName, err)
	}
	if err := os.WriteFile(c.tuningFile(dir), data, 0o600); err != nil {
		return fmt.Errorf("failed to save file %s.json: %v", c.ifName, err)
	}
	return nil
}

// tuningDel gives the interface back what it had. That this may fail is no error: it is about to go.
func tuningDel(c *call) error {
	conf, err := loadTuningConf(c.config, c.args)
	if err != nil {
		return configError{err}
	}
	if err := insidePath(c.netns, func() error { return c.untune(conf) }); err != nil && !gone(err) {
		c.log.Debug("cni plugin tuning: the interface is not as it was", "pod", c.containerID, "error", err)
	}
	return nil
}

func (c *call) untune(conf *tuningConf) error {
	file := c.tuningFile(conf.DataDir)
	data, err := os.ReadFile(file)
	if err != nil {
		return nil //nolint:nilerr // nothing was changed
	}
	var was linkTuning
	if err := json.Unmarshal(data, &was); err != nil {
		return nil //nolint:nilerr // torn: nobody knows
	}
	l, err := netlinksafe.LinkByName(c.ifName)
	if err != nil {
		return nil //nolint:nilerr // it has gone
	}
	var errs []error
	for _, change := range was.changes(true) {
		if err := change.do(l); err != nil {
			errs = append(errs, fmt.Errorf("failed to restore %s: %v", change.what, err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	return os.Remove(file)
}

func tuningCheck(c *call) error {
	if err := uniqueSysctls(c.config); err != nil {
		return err
	}
	conf, err := loadTuningConf(c.config, c.args)
	if err != nil {
		return configError{err}
	}
	if _, err := previous(&conf.PluginConf, ""); err != nil {
		return err
	}
	return insidePath(c.netns, func() error {
		if err := c.checkSysctls(conf.SysCtl); err != nil {
			return err
		}
		l, err := netlinksafe.LinkByName(c.ifName)
		if err != nil {
			return fmt.Errorf("Cannot find container link %v", c.ifName)
		}
		return c.checkTuning(conf, l)
	})
}

func (c *call) checkSysctls(want map[string]string) error {
	for name, value := range want {
		file, err := sysctlFile(name, c.ifName)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if is := strings.TrimSuffix(string(data), "\n"); is != value {
			return fmt.Errorf("Error: Tuning configured value of %s is %s, current value is %s", file, value, is)
		}
	}
	return nil
}

func (c *call) checkTuning(conf *tuningConf, l netlink.Link) error {
	a := l.Attrs()
	allmulti := a.RawFlags&unix.IFF_ALLMULTI != 0
	switch {
	case conf.Mac != "" && conf.Mac != a.HardwareAddr.String():
		return fmt.Errorf("Error: Tuning configured Ethernet of %s is %s, current value is %s", c.ifName, conf.Mac, a.HardwareAddr)
	case conf.Promisc != (a.Promisc != 0):
		return fmt.Errorf("Error: Tuning link %s configured promisc is %v, current value is %d", c.ifName, conf.Promisc, a.Promisc)
	case conf.Mtu != 0 && conf.Mtu != a.MTU:
		return fmt.Errorf("Error: Tuning configured MTU of %s is %d, current value is %d", c.ifName, conf.Mtu, a.MTU)
	case conf.Allmulti != nil && *conf.Allmulti != allmulti:
		return fmt.Errorf("Error: Tuning configured all-multicast mode of %s is %v, current value is %v", c.ifName, *conf.Allmulti, allmulti)
	case conf.TxQLen != nil && *conf.TxQLen != a.TxQLen:
		return fmt.Errorf("Error: Tuning configured Transmit Queue Length of %s is %d, current value is %d", c.ifName, *conf.TxQLen, a.TxQLen)
	}
	return nil
}
