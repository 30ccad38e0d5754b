package spec

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// First and last real-time signal as programs count them: glibc and musl keep 32 and 33 for themselves.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// sameSignals are names that Linux has twice.
var sameSignals = map[string]string{"SIGCLD": "SIGCHLD", "SIGPOLL": "SIGIO", "SIGIOT": "SIGABRT"}

// StopSignal is the signal to stop a container with, and its name ("SIGTERM", "SIGRTMIN+3"): the request's, else the
// image's, else SIGTERM.
func StopSignal(cfg *cri.ContainerConfig, image string) (syscall.Signal, string, error) {
	if s := cfg.GetStopSignal(); s != cri.Signal_SIGNAL_RUNTIME_DEFAULT {
		name := strings.TrimPrefix(s.String(), "SIGNAL_")
		name = strings.Replace(strings.Replace(name, "PLUS", "+", 1), "MINUS", "-", 1)
		if number, name, ok := parseSignal(name); ok {
			return number, name, nil
		}
		return 0, "", invalid("config.stop_signal", int32(s), "is not a signal")
	}
	if image == "" {
		return unix.SIGTERM, "SIGTERM", nil
	}
	number, name, ok := parseSignal(image)
	if !ok {
		return 0, "", invalid("image stop signal", image, "is not a signal")
	}
	return number, name, nil
}

// parseSignal reads "SIGTERM", "term", "15", "RTMIN+3" and returns number and canonical name.
func parseSignal(s string) (syscall.Signal, string, bool) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, "", false
		}
		return syscall.Signal(n), signalName(n), true
	}
	s = strings.ToUpper(s)
	if !strings.HasPrefix(s, "SIG") {
		s = "SIG" + s
	}
	if same, ok := sameSignals[s]; ok {
		s = same
	}
	if n := unix.SignalNum(s); n != 0 {
		return n, s, true
	}
	n, ok := realTimeSignal(s)
	if !ok || n < sigRTMin || n > sigRTMax {
		return 0, "", false
	}
	return syscall.Signal(n), signalName(n), true
}

func realTimeSignal(s string) (int, bool) {
	base, sign, rest := sigRTMin, 1, ""
	switch {
	case strings.HasPrefix(s, "SIGRTMIN"):
		rest = strings.TrimPrefix(s, "SIGRTMIN")
	case strings.HasPrefix(s, "SIGRTMAX"):
		base, sign, rest = sigRTMax, -1, strings.TrimPrefix(s, "SIGRTMAX")
	default:
		return 0, false
	}
	if rest == "" {
		return base, true
	}
	if rest[0] != '+' && rest[0] != '-' || rest[0] == '+' != (sign == 1) {
		return 0, false
	}
	n, err := strconv.ParseUint(rest[1:], 10, 6)
	return base + sign*int(n), err == nil
}

func signalName(n int) string {
	switch {
	case n == sigRTMin:
		return "SIGRTMIN"
	case n > sigRTMin && n <= sigRTMin+15:
		return "SIGRTMIN+" + strconv.Itoa(n-sigRTMin)
	case n == sigRTMax:
		return "SIGRTMAX"
	case n > sigRTMin:
		return "SIGRTMAX-" + strconv.Itoa(sigRTMax-n)
	}
	if name := unix.SignalName(syscall.Signal(n)); name != "" {
		return name
	}
	return strconv.Itoa(n)
}
