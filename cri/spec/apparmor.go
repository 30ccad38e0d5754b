package spec

import (
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// DefaultAppArmorProfile is the name of the RuntimeDefault profile; the caller loads it into the kernel.
const DefaultAppArmorProfile = "berth-default"

// AppArmorProfile is the name of the profile that the container will be under, or "". The caller asks the kernel whether
// it is loaded ([Input.AppArmorLoaded]).
//
// The field beats the deprecated string. Neither means the default profile where AppArmor is on; a privileged container
// is not confined, as the CRI says.
func AppArmorProfile(cfg *cri.ContainerConfig, h Host) (string, error) {
	sc := cfg.GetLinux().GetSecurityContext()
	p, at := sc.GetApparmor(), apparmorField
	if p == nil {
		at = securityContext + ".apparmor_profile"
		var err error
		if p, err = oldProfile(at, sc.GetApparmorProfile()); err != nil { //nolint:staticcheck // deprecated, not gone
			return "", err
		}
	}
	if err := validateProfile(at, p); err != nil {
		return "", err
	}
	if sc.GetPrivileged() || p.GetProfileType() == cri.SecurityProfile_Unconfined {
		return "", nil
	}
	if !h.AppArmorEnabled {
		if p == nil {
			return "", nil
		}
		return "", unmet(at, p.GetProfileType(), "is wanted, but this host has no AppArmor")
	}
	if p.GetProfileType() == cri.SecurityProfile_RuntimeDefault {
		return DefaultAppArmorProfile, nil
	}
	name := strings.TrimPrefix(p.GetLocalhostRef(), localhostPrefix)
	if name == "" || name == "unconfined" {
		return "", invalid(at+".localhost_ref", p.GetLocalhostRef(), "does not name a profile")
	}
	return name, nil
}
