package spec

import (
	"regexp"
	"strconv"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// SELinux is what the host says of the labels of containers.
type SELinux struct {
	// Enabled says that the kernel has SELinux on, with a policy.
	Enabled bool
	// Process and File are the contexts that the policy has for containers and their files. Where it has none, nothing is
	// labelled.
	Process, File string
}

// Labels are SELinux contexts: of the processes of a pod or of a container, and of the files that they may use. Empty
// ones label nothing.
type Labels struct{ Process, Mount string }

// PodLabels are the labels of a pod: those of the policy, at a level that keeps pods apart, with what the pod itself asks
// for on top. A pod that asks for a level does not get the one given.
func PodLabels(cfg *cri.PodSandboxConfig, h SELinux, level string) (Labels, error) {
	const at = "config.linux.security_context.selinux_options"
	opts := cfg.GetLinux().GetSecurityContext().GetSelinuxOptions()
	if !h.Enabled {
		return Labels{}, nil
	}
	if h.Process == "" || h.File == "" {
		return Labels{}, unlabelled(at, opts, "are wanted, but the policy of this host has no labels for containers")
	}
	return Labels{atLevel(h.Process, level), atLevel(h.File, level)}.with(at, opts)
}

// ContainerLabels are the labels of a container: its pod's, with what it asks for itself on top.
func ContainerLabels(cfg *cri.ContainerConfig, h SELinux, pod Labels) (Labels, error) {
	const at = securityContext + ".selinux_options"
	opts := cfg.GetLinux().GetSecurityContext().GetSelinuxOptions()
	if !h.Enabled {
		return Labels{}, nil
	}
	if pod == (Labels{}) {
		return Labels{}, unlabelled(at, opts, "are wanted, but the pod was made without labels")
	}
	return pod.with(at, opts)
}

// unlabelled refuses options that cannot be heeded. None are.
func unlabelled(at string, o *cri.SELinuxOption, why string) error {
	if o.GetUser() == "" && o.GetRole() == "" && o.GetType() == "" && o.GetLevel() == "" {
		return nil
	}
	return unmet(at, strings.Join([]string{o.GetUser(), o.GetRole(), o.GetType(), o.GetLevel()}, ":"), "%s", why)
}

// The fields of a context.
const (
	contextUser = iota
	contextRole
	contextType
	contextLevel
)

// with are the labels with options on top. Role and type are those of processes; files keep theirs.
func (l Labels) with(at string, o *cri.SELinuxOption) (Labels, error) {
	process, mount := strings.SplitN(l.Process, ":", contextLevel+1), strings.SplitN(l.Mount, ":", contextLevel+1)
	for _, f := range []struct {
		name, value string
		index       int
		valid       func(string) bool
		files       bool
		why         string
	}{
		{"user", o.GetUser(), contextUser, contextName.MatchString, true, "is not a name of SELinux"},
		{"role", o.GetRole(), contextRole, contextName.MatchString, false, "is not a name of SELinux"},
		{"type", o.GetType(), contextType, contextName.MatchString, false, "is not a name of SELinux"},
		{"level", o.GetLevel(), contextLevel, isLevel, true, "is not a level of SELinux, such as s0:c12,c34"},
	} {
		if f.value == "" {
			continue
		}
		if !f.valid(f.value) {
			return Labels{}, invalid(at+"."+f.name, f.value, "%s", f.why)
		}
		if f.index >= len(process) || f.index >= len(mount) {
			return Labels{}, unmet(at+"."+f.name, f.value, "is wanted, but the policy of this host has no levels")
		}
		process[f.index] = f.value
		if f.files {
			mount[f.index] = f.value
		}
	}
	return Labels{strings.Join(process, ":"), strings.Join(mount, ":")}, nil
}

// atLevel is the context at another level, if contexts of its policy have one.
func atLevel(context, level string) string {
	fields := strings.SplitN(context, ":", contextLevel+1)
	if len(fields) > contextLevel && level != "" {
		fields[contextLevel] = level
	}
	return strings.Join(fields, ":")
}

// Level is the level of the labels, or "".
func (l Labels) Level() string {
	if fields := strings.SplitN(l.Mount, ":", contextLevel+1); len(fields) > contextLevel {
		return fields[contextLevel]
	}
	return ""
}

// Shared is the context of files that containers of every level may use.
func (l Labels) Shared() string { return atLevel(l.Mount, "s0") }

var contextName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// levelPattern is a sensitivity, or a range of two, each with categories and ranges of them.
var levelPattern = regexp.MustCompile(`^s\d{1,2}(:` + categories + `)?(-s\d{1,2}(:` + categories + `)?)?$`)

const categories = `c\d{1,4}(\.c\d{1,4})?(,c\d{1,4}(\.c\d{1,4})?)*`

// isLevel says whether text is a level by its form; which levels there are is for the policy to say.
func isLevel(text string) bool {
	if len(text) > maxPlain || !levelPattern.MatchString(text) {
		return false
	}
	for _, part := range strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(":,-", r) }) {
		first, last, isRange := strings.Cut(part, ".")
		if isRange && category(first) >= category(last) {
			return false
		}
	}
	return true
}

// category is its number: 12 of c12.
func category(name string) int {
	n, _ := strconv.Atoi(name[1:]) // the pattern has digits there
	return n
}

// systemDirs are never relabelled, nor is anything below: what runs on the host counts on their labels. Of sharedDirs only
// what is below may be a volume.
var (
	systemDirs = []string{
		"/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/sys", "/usr",
		"/var/lib/kubelet/pki", "/root/.ssh",
	}
	sharedDirs = []string{
		"/", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/var", "/var/cache", "/var/lib", "/var/lib/kubelet",
		"/var/lib/kubelet/pods", "/var/log", "/var/log/containers", "/var/log/pods", "/var/run", "/var/spool", "/var/tmp",
	}
)

// mayRelabel says whether a path, resolved, may get a container's label (CVE-2021-43816).
func mayRelabel(path string) bool {
	for _, dir := range sharedDirs {
		if path == dir {
			return false
		}
	}
	for _, dir := range systemDirs {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			return false
		}
	}
	return true
}
