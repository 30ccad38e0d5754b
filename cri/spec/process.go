package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// validateProcess checks command, arguments, environment and working directory as requested.
func validateProcess(cfg *cri.ContainerConfig) error {
	if err := validateArguments("config.command", cfg.GetCommand()); err != nil {
		return err
	}
	if err := validateArguments("config.args", cfg.GetArgs()); err != nil {
		return err
	}
	for i, e := range cfg.GetEnvs() {
		at := index("config.envs", i)
		switch {
		case e.GetKey() == "":
			return missing(at+".key", "is empty")
		case strings.ContainsAny(e.GetKey(), "=\x00"):
			return invalid(at+".key", e.GetKey(), "contains '=' or a NUL byte")
		case strings.IndexByte(string(e.GetValue()), 0) >= 0:
			return invalid(at+".value", string(e.GetValue()), "contains a NUL byte")
		case len(e.GetKey())+1+len(e.GetValue()) > maxString:
			return invalid(at+".value", string(e.GetValue()), "makes the variable longer than %d bytes", maxString)
		case e.GetKey() == "HOME" && controls(string(e.GetValue())):
			// Other runtimes have copied HOME into the container's passwd (CVE-2022-4318).
			return invalid(at+".value", string(e.GetValue()), "contains a control character")
		}
	}
	if dir := cfg.GetWorkingDir(); dir != "" {
		return absolute("config.working_dir", dir)
	}
	return nil
}

func validateArguments(at string, list []string) error {
	for i, s := range list {
		if len(s) > maxString {
			return invalid(index(at, i), s, "is longer than an argument may be (%d bytes)", maxString)
		}
	}
	return noNUL(at, list)
}

func noNUL(at string, list []string) error {
	for i, s := range list {
		if strings.IndexByte(s, 0) >= 0 {
			return invalid(index(at, i), s, "contains a NUL byte")
		}
	}
	return nil
}

// arguments is the command line: a command replaces the image's entrypoint and drops its CMD, arguments replace its CMD.
func arguments(cfg *cri.ContainerConfig, image ocispec.ImageConfig) ([]string, error) {
	command, args := cfg.GetCommand(), cfg.GetArgs()
	if len(command) == 0 {
		command = image.Entrypoint
		if len(command) == 1 && command[0] == "" { // how docker build spells "no entrypoint"
			command = nil
		}
		if len(args) == 0 {
			args = image.Cmd
		}
	}
	all := slices.Concat(command, args) // a new array: the image's must not be shared
	if len(all) == 0 {
		return nil, missing("config.command", "is empty, and so are config.args and the image's entrypoint and command")
	}
	if all[0] == "" {
		return nil, invalid("config.command", all[0], "is not a program: the first argument is empty")
	}
	return all, noNUL("image entrypoint or command", all)
}

// environment is PATH, TERM and HOSTNAME, then the image's variables, then the request's: the last one wins. HOME is
// always set, else libcontainer would read it from the container's passwd, however long that is (CVE-2026-47262).
func environment(cfg *cri.ContainerConfig, image ocispec.ImageConfig, hostname, home string) ([]string, error) {
	var env variables
	env.set("PATH", defaultPath)
	if cfg.GetTty() {
		env.set("TERM", "xterm")
	}
	env.set("HOSTNAME", hostname)
	for _, kv := range image.Env {
		key, value, ok := strings.Cut(kv, "=")
		if !ok || key == "" {
			continue // says nothing; docker takes it as "unset", and nothing is set yet
		}
		if strings.IndexByte(kv, 0) >= 0 {
			return nil, invalid("image environment", kv, "contains a NUL byte")
		}
		if key == "HOME" && controls(value) {
			return nil, invalid("image environment", kv, "contains a control character")
		}
		env.set(key, value)
	}
	for _, e := range cfg.GetEnvs() {
		env.set(e.GetKey(), string(e.GetValue()))
	}
	if env.get("HOME") == "" {
		env.set("HOME", home)
	}
	return env.list, nil
}

// variables is an environment without duplicates, in the order in which the names were first set.
type variables struct {
	list []string
	at   map[string]int
}

func (v *variables) set(key, value string) {
	kv := key + "=" + value
	if i, ok := v.at[key]; ok {
		v.list[i] = kv
		return
	}
	if v.at == nil {
		v.at = map[string]int{}
	}
	v.at[key] = len(v.list)
	v.list = append(v.list, kv)
}

func (v *variables) get(key string) string {
	if i, ok := v.at[key]; ok {
		return v.list[i][len(key)+1:]
	}
	return ""
}

const imageWorkingDir = "image working directory"

// workingDir is the request's, else the image's, else "/". libcontainer makes it if it is missing, and refuses one that
// leads out of the container through a descriptor (CVE-2024-21626).
func workingDir(cfg *cri.ContainerConfig, image ocispec.ImageConfig) (string, error) {
	if dir := cfg.GetWorkingDir(); dir != "" {
		return path.Clean(dir), nil
	}
	dir := path.Join("/", image.WorkingDir)
	return dir, absolute(imageWorkingDir, dir)
}

// OfWorkingDir is what a container's creation has failed with, as the error of the field that cwd is from, where that could not be
// made or entered: libcontainer names the directory alone, and of one that it makes perhaps one above it.
func OfWorkingDir(err error, cfg *cri.ContainerConfig, cwd string) error {
	text := err.Error()
	is := strings.HasPrefix(text, fmt.Sprintf("chdir to cwd (%q)", cwd))
	for dir := cwd; !is && len(dir) > 1; dir = path.Dir(dir) {
		is = strings.HasPrefix(text, "mkdir "+dir+": ")
	}
	switch {
	case !is:
		return err
	case cfg.GetWorkingDir() != "":
		return unmet("config.working_dir", cfg.GetWorkingDir(), "cannot be used: %s", text)
	}
	return unmet(imageWorkingDir, cwd, "cannot be used: %s", text)
}

// ExecProcess is a process beside the container's own: same user, groups, capabilities, environment and directory.
// Seccomp, namespaces and cgroup come from the container that libcontainer has loaded.
func ExecProcess(container *specs.Spec, cmd []string, tty bool) (*specs.Process, error) {
	if len(cmd) == 0 || cmd[0] == "" {
		return nil, missing("cmd", "is empty")
	}
	if err := noNUL("cmd", cmd); err != nil {
		return nil, err
	}
	p := *container.Process
	p.Args = slices.Clone(cmd)
	p.Terminal, p.ConsoleSize = tty, nil
	p.Env = slices.Clone(p.Env)
	if tty && !slices.ContainsFunc(p.Env, func(kv string) bool { return strings.HasPrefix(kv, "TERM=") }) {
		p.Env = append(p.Env, "TERM=xterm")
	}
	p.User.AdditionalGids = slices.Clone(p.User.AdditionalGids)
	p.Rlimits = slices.Clone(p.Rlimits)
	if c := p.Capabilities; c != nil {
		p.Capabilities = &specs.LinuxCapabilities{
			Bounding: slices.Clone(c.Bounding), Effective: slices.Clone(c.Effective), Permitted: slices.Clone(c.Permitted),
			Inheritable: slices.Clone(c.Inheritable), Ambient: slices.Clone(c.Ambient),
		}
	}
	if p.OOMScoreAdj != nil {
		adj := *p.OOMScoreAdj
		p.OOMScoreAdj = &adj
	}
	return &p, nil
}
