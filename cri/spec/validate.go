package spec

import (
	"net/netip"
	"path"
	"slices"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ValidateSandbox refuses a pod that can never run, naming field and value.
func ValidateSandbox(cfg *cri.PodSandboxConfig) error { return validateSandbox("config", cfg) }

func validateSandbox(at string, cfg *cri.PodSandboxConfig) error {
	meta := cfg.GetMetadata()
	if meta.GetName() == "" {
		return missing(at+".metadata.name", "is empty")
	}
	if err := plainFields(
		fieldValue{at + ".metadata.name", meta.GetName()},
		fieldValue{at + ".metadata.namespace", meta.GetNamespace()},
		fieldValue{at + ".metadata.uid", meta.GetUid()},
	); err != nil {
		return err
	}
	if err := validateMaps(at, cfg.GetLabels(), cfg.GetAnnotations()); err != nil {
		return err
	}
	if cfg.GetWindows() != nil {
		return invalid(at+".windows", "set", "is for pods of Windows")
	}
	if err := validateHostname(at+".hostname", cfg.GetHostname()); err != nil {
		return err
	}
	if dir := cfg.GetLogDirectory(); dir != "" && (!path.IsAbs(dir) || upward(dir) || controls(dir)) {
		return invalid(at+".log_directory", dir, "is not an absolute path without '..' and control characters")
	}
	if dir := cfg.GetLogDirectory(); tooLong(dir) {
		return invalid(at+".log_directory", dir, "is longer than a path or a name in it may be")
	}
	if err := validateDNS(at+".dns_config", cfg.GetDnsConfig()); err != nil {
		return err
	}
	if err := validatePorts(at+".port_mappings", cfg.GetPortMappings()); err != nil {
		return err
	}
	if parent := cfg.GetLinux().GetCgroupParent(); parent != "" && (!path.IsAbs(parent) || upward(parent) || controls(parent)) {
		return invalid(at+".linux.cgroup_parent", parent, "is not an absolute path without '..' and control characters")
	}
	if parent := cfg.GetLinux().GetCgroupParent(); tooLong(parent) {
		return invalid(at+".linux.cgroup_parent", parent, "is longer than a path or a name in it may be")
	}
	if _, err := sandboxSysctls(at+".linux.sysctls", cfg); err != nil {
		return err
	}
	return validateSandboxSecurity(at+".linux.security_context", cfg.GetLinux().GetSecurityContext())
}

func validateSandboxSecurity(at string, sc *cri.LinuxSandboxSecurityContext) error {
	ns := sc.GetNamespaceOptions()
	if err := validateNamespaceModes(at+".namespace_options", ns); err != nil {
		return err
	}
	if err := validateUserFields(at, sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetSupplementalGroups(),
		sc.GetSupplementalGroupsPolicy()); err != nil {
		return err
	}
	if err := validateProfile(at+".seccomp", sc.GetSeccomp()); err != nil {
		return err
	}
	if _, err := oldProfile(at+".seccomp_profile_path", sc.GetSeccompProfilePath()); err != nil { //nolint:staticcheck // deprecated, not gone
		return err
	}
	if err := validateProfile(at+".apparmor", sc.GetApparmor()); err != nil {
		return err
	}
	if err := validateUserns(at+".namespace_options.userns_options", ns.GetUsernsOptions()); err != nil {
		return err
	}
	return validateUsernsSharing(at+".namespace_options", ns)
}

// validatePorts refuses also a port of the node that is mapped twice: only one of both would be, and which is chance.
func validatePorts(at string, list []*cri.PortMapping) error {
	type hostPort struct {
		protocol cri.Protocol
		port     int32
		ip       string
	}
	taken := map[hostPort]bool{}
	for i, p := range list {
		if err := validatePort(index(at, i), p); err != nil {
			return err
		}
		if p.GetHostPort() == 0 {
			continue // none is mapped
		}
		h := hostPort{p.GetProtocol(), p.GetHostPort(), p.GetHostIp()}
		if taken[h] {
			return invalid(index(at, i)+".host_port", h.port, "is given twice for %v", h.protocol)
		}
		taken[h] = true
	}
	return nil
}

func validatePort(at string, p *cri.PortMapping) error {
	switch p.GetProtocol() {
	case cri.Protocol_TCP, cri.Protocol_UDP, cri.Protocol_SCTP:
	default:
		return invalid(at+".protocol", int32(p.GetProtocol()), "is not a protocol")
	}
	const last = 65535
	if n := p.GetHostPort(); n < 0 || n > last {
		return invalid(at+".host_port", n, "is outside 0..%d", last)
	}
	if n := p.GetContainerPort(); n < 0 || n > last || n == 0 && p.GetHostPort() > 0 {
		return invalid(at+".container_port", n, "is outside 1..%d", last)
	}
	if ip := p.GetHostIp(); ip != "" {
		if _, err := netip.ParseAddr(ip); err != nil {
			return invalid(at+".host_ip", ip, "is not an IP address")
		}
	}
	return nil
}

// ValidateContainer refuses a container that can never run in that pod, naming field and value.
func ValidateContainer(sandbox *cri.PodSandboxConfig, cfg *cri.ContainerConfig) error {
	if cfg.GetMetadata().GetName() == "" {
		return missing("config.metadata.name", "is empty")
	}
	if cfg.GetImage().GetImage() == "" {
		return missing("config.image.image", "is empty")
	}
	if err := plainFields(
		fieldValue{"config.metadata.name", cfg.GetMetadata().GetName()},
		fieldValue{"config.image.image", cfg.GetImage().GetImage()},
	); err != nil {
		return err
	}
	if p := cfg.GetLogPath(); p != "" && (path.IsAbs(p) || upward(p) || controls(p)) {
		return invalid("config.log_path", p, "is not a relative path without '..' and control characters")
	}
	if p := cfg.GetLogPath(); tooLong(p) || len(sandbox.GetLogDirectory())+1+len(p) > maxPath {
		return invalid("config.log_path", p, "is longer than a path or a name in it may be")
	}
	if _, _, err := StopSignal(cfg, ""); err != nil {
		return err
	}
	if err := validateMaps("config", cfg.GetLabels(), cfg.GetAnnotations()); err != nil {
		return err
	}
	if err := validateMap("config.image.annotations", cfg.GetImage().GetAnnotations(), maxAnnotations); err != nil {
		return err
	}
	if cfg.GetWindows() != nil {
		return invalid("config.windows", "set", "is for containers of Windows")
	}
	for _, check := range []func(*cri.ContainerConfig) error{validateLengths, validateProcess, validateMounts, validateDevices} {
		if err := check(cfg); err != nil {
			return err
		}
	}
	if err := ValidateResources(resourcesField, cfg.GetLinux().GetResources()); err != nil {
		return err
	}
	return validateSecurity(sandbox, cfg)
}

func validateSecurity(sandbox *cri.PodSandboxConfig, cfg *cri.ContainerConfig) error {
	sc := cfg.GetLinux().GetSecurityContext()
	if sc.GetPrivileged() && !sandbox.GetLinux().GetSecurityContext().GetPrivileged() {
		return invalid(securityContext+".privileged", true, "is asked for in a pod that is not privileged")
	}
	if err := validateIdentity(sc); err != nil {
		return err
	}
	if err := validateCapabilities(sc.GetCapabilities()); err != nil {
		return err
	}
	if _, err := seccompProfile(sc); err != nil {
		return err
	}
	if _, err := AppArmorProfile(cfg, Host{AppArmorEnabled: true}); err != nil { // whether the host has it comes later
		return err
	}
	for i, p := range sc.GetMaskedPaths() {
		if err := absolute(index(securityContext+".masked_paths", i), p); err != nil {
			return err
		}
	}
	for i, p := range sc.GetReadonlyPaths() {
		if err := absolute(index(securityContext+".readonly_paths", i), p); err != nil {
			return err
		}
	}
	if err := validateContainerNamespaces(sandbox, sc); err != nil {
		return err
	}
	const userns = securityContext + ".namespace_options.userns_options"
	own, pods := sc.GetNamespaceOptions().GetUsernsOptions(), sandboxNamespaces(sandbox).GetUsernsOptions()
	if err := validateUserns(userns, own); err != nil {
		return err
	}
	if !sameUserns(own, pods) {
		return invalid(userns, usernsText(own), "differs from the pod's, %s", usernsText(pods))
	}
	for i, m := range cfg.GetMounts() {
		if err := validateMountMap(index("config.mounts", i), m, pods); err != nil {
			return err
		}
	}
	return validateMapped(sandbox, securityContext+".run_as_user.value", sc.GetRunAsUser().GetValue(),
		securityContext+".run_as_group.value", sc.GetRunAsGroup().GetValue(), sc.GetSupplementalGroups())
}

type fieldValue struct{ at, value string }

// maxPlain is more than any name or uid of Kubernetes has, and than the parts of an image's name make together. A pod's go
// into the arguments of network plugins: one for which no plugin can be started can neither be made nor be undone.
const maxPlain = 1024

// plainFields refuses control characters in any of them, and what is too long for a name.
func plainFields(fields ...fieldValue) error {
	for _, f := range fields {
		if len(f.value) > maxPlain {
			return invalid(f.at, f.value, "is longer than %d bytes", maxPlain)
		}
		if err := plain(f.at, f.value); err != nil {
			return err
		}
	}
	return nil
}

// upward says whether a path has a ".." in it, which no honest request needs.
func upward(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }
