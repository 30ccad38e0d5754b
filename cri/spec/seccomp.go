package spec

import (
	"bytes"
	"encoding/json"
	"path"
	"slices"
	"strings"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	localhostPrefix = "localhost/"
	seccompField    = securityContext + ".seccomp"
	apparmorField   = securityContext + ".apparmor"
)

// validateProfile checks a seccomp or AppArmor profile of the request; nil is one too.
func validateProfile(at string, p *cri.SecurityProfile) error {
	switch t := p.GetProfileType(); t {
	case cri.SecurityProfile_RuntimeDefault, cri.SecurityProfile_Unconfined:
		if p.GetLocalhostRef() != "" {
			return invalid(at+".localhost_ref", p.GetLocalhostRef(), "is given with profile type %v", t)
		}
	case cri.SecurityProfile_Localhost:
		if p.GetLocalhostRef() == "" {
			return missing(at+".localhost_ref", "is empty with profile type Localhost")
		}
	default:
		return invalid(at+".profile_type", int32(t), "is not a profile type")
	}
	if tooLong(p.GetLocalhostRef()) {
		return invalid(at+".localhost_ref", p.GetLocalhostRef(), "is longer than a path or a name in it may be")
	}
	return plain(at+".localhost_ref", p.GetLocalhostRef())
}

// oldProfile reads the deprecated string form that preceded SecurityProfile. "" is nil: what that means differs.
func oldProfile(at, s string) (*cri.SecurityProfile, error) {
	switch {
	case s == "":
		return nil, nil
	case s == "runtime/default" || s == "docker/default":
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}, nil
	case s == "unconfined":
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(s, localhostPrefix) && s != localhostPrefix:
		p := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: strings.TrimPrefix(s, localhostPrefix)}
		return p, validateProfile(at, p)
	default:
		return nil, invalid(at, s, "is neither runtime/default, unconfined nor localhost/PROFILE")
	}
}

// seccompProfile is the profile that applies; nil is unconfined, as the CRI says. A privileged container is unconfined
// whatever it asks for.
func seccompProfile(sc *cri.LinuxContainerSecurityContext) (*cri.SecurityProfile, error) {
	p, at := sc.GetSeccomp(), seccompField
	if p == nil {
		at = securityContext + ".seccomp_profile_path"
		var err error
		if p, err = oldProfile(at, sc.GetSeccompProfilePath()); err != nil { //nolint:staticcheck // deprecated, not gone
			return nil, err
		}
	}
	if err := validateProfile(at, p); err != nil {
		return nil, err
	}
	if p.GetProfileType() == cri.SecurityProfile_Localhost {
		if ref := p.GetLocalhostRef(); !path.IsAbs(ref) || path.Clean(ref) != ref {
			return nil, invalid(at+".localhost_ref", ref, "is not a clean absolute path")
		}
	}
	if p == nil || sc.GetPrivileged() {
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, nil
	}
	return p, nil
}

// SeccompProfilePath is the absolute path of the Localhost profile that the container wants, or "". The caller reads
// that file into [Input.SeccompProfile]; a missing one is an error (ErrInvalidArgument), never unconfined.
func SeccompProfilePath(cfg *cri.ContainerConfig) (string, error) {
	p, err := seccompProfile(cfg.GetLinux().GetSecurityContext())
	if err != nil || p.GetProfileType() != cri.SecurityProfile_Localhost {
		return "", err
	}
	return p.GetLocalhostRef(), nil
}

// seccompFilter is the filter of a container whose capabilities are already decided in s: the default profile opens the
// system calls that they stand for.
func seccompFilter(sc *cri.LinuxContainerSecurityContext, s *specs.Spec, local []byte, h Host) (*specs.LinuxSeccomp, error) {
	p, err := seccompProfile(sc)
	if err != nil || p.GetProfileType() == cri.SecurityProfile_Unconfined {
		return nil, err
	}
	if !h.SeccompEnabled {
		return nil, unmet(seccompField, p.GetProfileType(), "is wanted, but this host cannot filter system calls")
	}
	if p.GetProfileType() == cri.SecurityProfile_RuntimeDefault {
		return seccomp.GetDefaultProfile(s)
	}

	// An empty profile has meant "unconfined" elsewhere (CVE-2023-2431); here it is an error, and so is one that
	// libcontainer would refuse later.
	ref := p.GetLocalhostRef()
	if len(bytes.TrimSpace(local)) == 0 {
		return nil, invalid(seccompField+".localhost_ref", ref, "is empty or missing on this host")
	}
	var parsed seccomp.Seccomp
	if err := json.Unmarshal(local, &parsed); err != nil {
		return nil, invalid(seccompField+".localhost_ref", ref, "is not a seccomp profile: %v", err)
	}
	if slices.Contains(parsed.Syscalls, nil) { // LoadProfile of moby/profiles v0.3.0 panics on these
		return nil, invalid(seccompField+".localhost_ref", ref, "is not a seccomp profile: a rule is null")
	}
	filter, err := seccomp.LoadProfile(string(local), s)
	if err != nil {
		return nil, invalid(seccompField+".localhost_ref", ref, "is not a seccomp profile: %v", err)
	}
	if filter == nil {
		return nil, invalid(seccompField+".localhost_ref", ref, "is an empty profile")
	}
	if why := badFilter(filter); why != "" {
		return nil, invalid(seccompField+".localhost_ref", ref, "is not a seccomp profile: %s", why)
	}
	return filter, nil
}

// badFilter says what libcontainer would not understand.
func badFilter(f *specs.LinuxSeccomp) string {
	action := func(a specs.LinuxSeccompAction) bool {
		switch a {
		case specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno, specs.ActTrace,
			specs.ActAllow, specs.ActLog, specs.ActNotify:
			return true
		}
		return false
	}
	operators := []specs.LinuxSeccompOperator{
		specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan,
		specs.OpMaskedEqual,
	}
	if !action(f.DefaultAction) {
		return "default action " + show(string(f.DefaultAction)) + " is unknown"
	}
	for _, call := range f.Syscalls {
		if len(call.Names) == 0 {
			return "a rule without system calls"
		}
		if !action(call.Action) {
			return "action " + show(string(call.Action)) + " is unknown"
		}
		for _, arg := range call.Args {
			if !slices.Contains(operators, arg.Op) {
				return "operator " + show(string(arg.Op)) + " is unknown"
			}
			if arg.Index > 5 {
				return "a system call has six arguments at most"
			}
		}
	}
	return ""
}
