package spec

import (
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const rlimitsField = "ulimit"

// rlimitNames are the resources of setrlimit(2) by the names that ulimit, docker and CRI-O call them by.
var rlimitNames = []string{
	"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
	"sigpending", "stack",
}

// ParseRlimits parses a list of limits of which each names another resource.
func ParseRlimits(list []string) ([]specs.POSIXRlimit, error) {
	var limits []specs.POSIXRlimit
	for _, s := range list {
		l, err := ParseRlimit(s)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(limits, func(o specs.POSIXRlimit) bool { return o.Type == l.Type }) {
			return nil, invalid(rlimitsField, s, "limits a resource that is limited already")
		}
		limits = append(limits, l)
	}
	return limits, nil
}

// ParseRlimit parses NAME=SOFT:HARD, or NAME=BOTH; -1 and "unlimited" are no limit.
func ParseRlimit(s string) (specs.POSIXRlimit, error) {
	var l specs.POSIXRlimit
	name, values, ok := strings.Cut(s, "=")
	if !ok {
		return l, invalid(rlimitsField, s, "is not NAME=SOFT:HARD")
	}
	if !slices.Contains(rlimitNames, name) {
		return l, invalid(rlimitsField, s, "names none of %s", strings.Join(rlimitNames, ", "))
	}
	soft, hard, both := strings.Cut(values, ":")
	if !both {
		hard = soft
	}
	l.Type = "RLIMIT_" + strings.ToUpper(name)
	for _, v := range []struct {
		text string
		to   *uint64
	}{{soft, &l.Soft}, {hard, &l.Hard}} {
		if v.text == "-1" || v.text == "unlimited" {
			*v.to = math.MaxUint64
			continue
		}
		n, err := strconv.ParseUint(v.text, 10, 64)
		if err != nil {
			return specs.POSIXRlimit{}, invalid(rlimitsField, s, "has a limit that is no number")
		}
		*v.to = n
	}
	if l.Soft > l.Hard {
		return specs.POSIXRlimit{}, invalid(rlimitsField, s, "has a soft limit above the hard one")
	}
	return l, nil
}

// KnownRlimit says whether a resource has that name in OCI specifications, such as RLIMIT_NOFILE.
func KnownRlimit(name string) bool {
	return slices.ContainsFunc(rlimitNames, func(short string) bool { return name == "RLIMIT_"+strings.ToUpper(short) })
}
