package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

func validateDevices(cfg *cri.ContainerConfig) error {
	for i, d := range cfg.GetDevices() {
		at := index("config.devices", i)
		if err := absolute(at+".container_path", d.GetContainerPath()); err != nil {
			return err
		}
		if err := absolute(at+".host_path", d.GetHostPath()); err != nil {
			return err
		}
		if path.Clean(d.GetContainerPath()) == "/" {
			return invalid(at+".container_path", d.GetContainerPath(), "is the root of the container")
		}
		if path.Clean(d.GetHostPath()) == "/" { // a walk through all file systems of the host
			return invalid(at+".host_path", d.GetHostPath(), "is the root of the host")
		}
		if p := d.GetPermissions(); p == "" || strings.Trim(p, "rwm") != "" {
			return invalid(at+".permissions", p, "is not made of r, w and m")
		}
	}
	for i, d := range cfg.GetCDIDevices() {
		if _, _, _, err := parser.ParseQualifiedName(d.GetName()); err != nil {
			return invalid(index("config.CDI_devices", i)+".name", d.GetName(), "is not the name of a CDI device, vendor/class=name")
		}
	}
	return nil
}

// devices decides which device nodes a container has and may use.
//
// The first rule denies all and the rest allow, never the other way round: a deny list is emulated wrongly by some
// kernels and forgets what is plugged in later (GHSA-g54h-m393-cpwq). What every container has (null, zero, full, random,
// urandom, tty, ptmx, pts, and mknod itself) libcontainer's specconv adds to nodes and rules; nothing is left to do for
// whoever calls it.
func devices(cfg *cri.ContainerConfig, found [][]specs.LinuxDevice, h Host) ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) {
	if len(found) != len(cfg.GetDevices()) {
		return nil, nil, fmt.Errorf("spec.Input: facts of %d devices for %d in the request", len(found), len(cfg.GetDevices()))
	}
	var nodes []specs.LinuxDevice
	add := func(d specs.LinuxDevice) {
		nodes = slices.DeleteFunc(nodes, func(n specs.LinuxDevice) bool { return n.Path == d.Path })
		nodes = append(nodes, d)
	}
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	if cfg.GetLinux().GetSecurityContext().GetPrivileged() {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"})
		for _, d := range h.Devices {
			nodes = append(nodes, cloneDevice(d, d.Path))
		}
	}
	for i, d := range cfg.GetDevices() {
		at := index("config.devices", i) + ".host_path"
		if len(found[i]) == 0 {
			return nil, nil, unmet(at, d.GetHostPath(), "is not a device and holds none")
		}
		for _, n := range found[i] {
			if n.Type != "c" && n.Type != "b" {
				return nil, nil, unmet(at, d.GetHostPath(), "is a node of type %q, not a device", n.Type)
			}
			n = cloneDevice(n, path.Join(d.GetContainerPath(), "/"+n.Path))
			add(n)
			major, minor := n.Major, n.Minor
			rules = append(rules, specs.LinuxDeviceCgroup{
				Allow: true, Type: n.Type, Major: &major, Minor: &minor, Access: permissions(d.GetPermissions()),
			})
		}
	}
	return nodes, rules, nil
}

// permissions brings them into the kernel's order, each once.
func permissions(p string) string {
	var b strings.Builder
	for _, c := range "rwm" {
		if strings.ContainsRune(p, c) {
			b.WriteRune(c)
		}
	}
	return b.String()
}

// cloneDevice shares no pointer with the host's list.
func cloneDevice(d specs.LinuxDevice, at string) specs.LinuxDevice {
	c := specs.LinuxDevice{Path: at, Type: d.Type, Major: d.Major, Minor: d.Minor}
	if d.FileMode != nil {
		mode := *d.FileMode
		c.FileMode = &mode
	}
	if d.UID != nil {
		uid := *d.UID
		c.UID = &uid
	}
	if d.GID != nil {
		gid := *d.GID
		c.GID = &gid
	}
	return c
}
