package spec

import (
	"maps"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Bounds on what a request may hold. They are far above what Kubernetes sends, and keep a record, a specification and an
// answer to ListContainers (16 MiB with everybody's labels) at a size that can be read back.
const (
	maxAnnotations = 1 << 20   // bytes of all keys and values; the API server takes 256 KiB
	maxLabels      = 256 << 10 // bytes of all keys and values
	maxListed      = 4096      // mounts, devices, masked and read-only paths, each; a kernel takes 100,000 mounts
	maxWord        = 4096      // bytes of an entry of the DNS configuration
)

// maxString bounds one argument or variable of execve(2), in bytes: MAX_ARG_STRLEN without its NUL.
const maxString = 128<<10 - 1

// defaultStack is the limit of a stack, in bytes, on most machines.
const defaultStack = 8 << 20

// ArgumentSpace is what execve(2) takes for all arguments and variables of a program under a stack limit in bytes: a
// quarter of it, at least 128 KiB and at most three quarters of 8 MiB (bprm_stack_limits in fs/exec.c).
func ArgumentSpace(stack uint64) int { return int(max(min(stack/4, 6<<20), 128<<10)) }

// validateMaps bounds labels and annotations, whose contents are nobody's business: they come back as they are.
func validateMaps(at string, labels, annotations map[string]string) error {
	if err := validateMap(at+".labels", labels, maxLabels); err != nil {
		return err
	}
	return validateMap(at+".annotations", annotations, maxAnnotations)
}

func validateMap(at string, m map[string]string, most int) error {
	total := 0
	for _, key := range slices.Sorted(maps.Keys(m)) { // sorted: the same request gives the same error
		if key == "" {
			return invalid(at, key, "is an empty key")
		}
		if total += len(key) + len(m[key]); total > most {
			return invalid(at, key, "brings the keys and values to %d bytes, more than %d", total, most)
		}
	}
	return nil
}

// validateLengths bounds the lists that each become a mount or a node.
func validateLengths(cfg *cri.ContainerConfig) error {
	sc := cfg.GetLinux().GetSecurityContext()
	for _, list := range []struct {
		at string
		n  int
	}{
		{"config.mounts", len(cfg.GetMounts())},
		{"config.devices", len(cfg.GetDevices())},
		{"config.CDI_devices", len(cfg.GetCDIDevices())},
		{securityContext + ".masked_paths", len(sc.GetMaskedPaths())},
		{securityContext + ".readonly_paths", len(sc.GetReadonlyPaths())},
	} {
		if list.n > maxListed {
			return invalid(list.at, list.n, "entries are more than %d", maxListed)
		}
	}
	return nil
}

// executable refuses arguments and an environment that execve(2) would refuse with nothing but "argument list too long".
func executable(p *specs.Process, space int) error {
	if space <= 0 {
		space = ArgumentSpace(defaultStack)
	}
	const pointer = 8
	total := len(p.Args[0]) + 1 // the program's name is there once more
	for i, arg := range p.Args {
		if len(arg) > maxString {
			return invalid(index("config.command and config.args", i), arg, "is longer than an argument may be (%d bytes)", maxString)
		}
		total += len(arg) + 1 + pointer
	}
	for _, kv := range p.Env {
		if len(kv) > maxString {
			return invalid("config.envs", kv, "is longer than a variable with its name may be (%d bytes)", maxString)
		}
		total += len(kv) + 1 + pointer
	}
	if total > space {
		return invalid("config.command, config.args and config.envs", total, "bytes together with the image's are more than the %d that a program can be started with", space)
	}
	return nil
}
