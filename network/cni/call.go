package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

// ErrProgram says that a plugin with this configuration, on this node, is not answered here: its program has to be run.
// Nothing was done yet.
var ErrProgram = errors.New("not answered in process")

// ErrConfig says that a plugin cannot read its configuration. It has done nothing.
var ErrConfig = errors.New("configuration cannot be read")

// configError is ErrConfig with the words of the reference plugin alone.
type configError struct{ error }

func (e configError) Unwrap() error        { return e.error }
func (e configError) Is(target error) bool { return target == ErrConfig }

// Plugins answers plugins in this process.
type Plugins struct {
	log        *slog.Logger
	background sync.Map // what no call waits for: channels that are closed when it is done
}

// New makes Plugins.
func New(log *slog.Logger) *Plugins { return &Plugins{log: log} }

// Close waits until what calls have not waited for is done.
func (p *Plugins) Close() {
	p.background.Range(func(done, _ any) bool {
		<-done.(chan struct{})
		return true
	})
}

// leave runs f, for which the call does not wait.
func (p *Plugins) leave(f func()) {
	done := make(chan struct{})
	p.background.Store(done, nil)
	go func() {
		defer p.background.Delete(done)
		defer close(done)
		f()
	}()
}

// Prepare finds out what a plugin of that type has to know of the node, which takes some processes the first time. Without it
// the first pod waits for that.
func (p *Plugins) Prepare(typ string) {
	table := map[string]string{"bridge": tableNAT, "ptp": tableNAT, "portmap": tableNAT, "firewall": tableFilter}[typ]
	if table == "" {
		return
	}
	for _, v6 := range []bool{false, true} {
		_ = p.iptablesDiffers(table, v6) // it logs what matters
	}
}

// plugin is what one answers. A command without a function succeeds and does nothing.
type plugin struct {
	versions                version.PluginInfo
	add, del, check, status func(*call) error
}

var plugins = map[string]plugin{}

// Known says whether there is a plugin of that type here.
func Known(typ string) bool { _, ok := plugins[typ]; return ok }

// Types are the types of plugins that there are here.
func Types() []string { return slices.Sorted(maps.Keys(plugins)) }

// call is one command to a plugin.
type call struct {
	*Plugins
	ctx     context.Context
	environ []string
	exec    invoke.Exec // for the plugins that this one delegates to

	command, containerID, netns, ifName, args, path string

	config []byte
	out    bytes.Buffer
}

// Run answers a plugin of a type that is known: environ, config and what it returns are what a program would have in its
// environment, read and write. Plugins that it delegates to are run by exec. The network namespace of the node is that of
// the calling thread. The error wraps a *types.Error or ErrProgram;
// it is ErrConfig besides where ADD or DEL of the plugin itself could not read the configuration.
func (p *Plugins) Run(ctx context.Context, typ string, config []byte, environ []string, exec invoke.Exec) (_ []byte, err error) {
	c := &call{Plugins: p, ctx: ctx, environ: environ, exec: exec, config: config}
	defer func() {
		if v := recover(); v != nil {
			p.log.Error("cni plugin panics", "plugin", typ, "panic", v, "stack", string(debug.Stack()))
			err = types.NewError(types.ErrInternal, fmt.Sprintf("panic: %v", v), "")
		}
	}()
	if err := c.dispatch(plugins[typ]); err != nil {
		return nil, specError(err)
	}
	return c.out.Bytes(), nil
}

// specError makes an error of the specification of any other.
func specError(err error) error {
	var e *types.Error
	if errors.Is(err, ErrProgram) || errors.As(err, &e) {
		return err
	}
	return internalError{types.NewError(types.ErrInternal, err.Error(), ""), err}
}

// internalError is an error of the specification that has not forgotten where it comes from.
type internalError struct {
	spec  *types.Error
	cause error
}

func (e internalError) Error() string { return e.spec.Error() }

func (e internalError) Unwrap() []error { return []error{e.spec, e.cause} }

func (c *call) dispatch(p plugin) error {
	if err := c.readEnviron(); err != nil {
		return err
	}
	if c.command == "VERSION" {
		return p.versions.Encode(&c.out)
	}
	if err := c.validateConfig(); err != nil {
		return err
	}
	switch c.command {
	case "ADD":
		return c.runOutside(p, p.add)
	case "DEL":
		return c.runOutside(p, p.del)
	case "CHECK":
		return c.runSince(p, "0.4.0", p.check)
	case "GC":
		return c.runSince(p, "1.1.0", nil)
	case "STATUS":
		return c.runSince(p, "1.1.0", p.status)
	}
	return types.NewError(types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND: "+c.command, "")
}

// readEnviron takes over the arguments in the environment and checks those that the command needs.
func (c *call) readEnviron() error {
	env := map[string]string{}
	for _, kv := range c.environ {
		if name, value, ok := strings.Cut(kv, "="); ok {
			env[name] = value
		}
	}
	c.command = env["CNI_COMMAND"]
	pod := []string{"ADD", "CHECK", "DEL"}
	all := []string{"ADD", "CHECK", "DEL", "GC", "STATUS"}
	var missing []string
	for _, v := range []struct {
		name  string
		into  *string
		need  []string
		check func(string) *types.Error
	}{
		{name: "CNI_COMMAND", into: &c.command, need: []string{c.command}},
		{name: "CNI_CONTAINERID", into: &c.containerID, need: pod, check: utils.ValidateContainerID},
		{name: "CNI_NETNS", into: &c.netns, need: []string{"ADD", "CHECK"}},
		{name: "CNI_IFNAME", into: &c.ifName, need: pod, check: utils.ValidateInterfaceName},
		{name: "CNI_ARGS", into: &c.args},
		{name: "CNI_PATH", into: &c.path, need: all},
	} {
		*v.into = env[v.name]
		if !slices.Contains(v.need, c.command) {
			continue
		}
		if *v.into == "" {
			missing = append(missing, v.name)
			continue
		}
		if v.check != nil {
			if err := v.check(*v.into); err != nil {
				return err
			}
		}
	}
	if len(missing) > 0 {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("required env variables [%s] missing", strings.Join(missing, ",")), "")
	}
	return nil
}

func (c *call) validateConfig() error {
	var conf struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(c.config, &conf); err != nil {
		return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("error unmarshall network config: %v", err), "")
	}
	if conf.Name == "" {
		return types.NewError(types.ErrInvalidNetworkConfig, "missing network name", "")
	}
	if err := utils.ValidateNetworkName(conf.Name); err != nil {
		return err
	}
	return nil
}

// runOutside runs a command that sets up or tears down, which it must not have done to the node's own namespace.
func (c *call) runOutside(p plugin, f func(*call) error) error {
	if err := c.runVersion(p, f); err != nil {
		return err
	}
	same, err := ns.CheckNetNS(c.netns)
	switch {
	case err != nil:
		return err
	case same:
		return types.NewError(types.ErrInvalidNetNS, "plugin's netns and netns from CNI_NETNS should not be the same", "")
	}
	return nil
}

// runSince runs a command that the specification has since a version.
func (c *call) runSince(p plugin, since string, f func(*call) error) error {
	v, err := c.configVersion()
	if err != nil {
		return err
	}
	known, err := version.GreaterThanOrEqualTo(v, since)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	if !known {
		return types.NewError(types.ErrIncompatibleCNIVersion, "config version does not allow "+c.command, "")
	}
	for _, supported := range p.versions.SupportedVersions() {
		if enough, err := version.GreaterThanOrEqualTo(supported, v); err == nil && enough {
			return c.runVersion(p, f)
		}
	}
	return types.NewError(types.ErrIncompatibleCNIVersion, "plugin version does not allow "+c.command, "")
}

func (c *call) runVersion(p plugin, f func(*call) error) error {
	v, err := c.configVersion()
	if err != nil {
		return err
	}
	if err := (&version.Reconciler{}).Check(v, p.versions); err != nil {
		return types.NewError(types.ErrIncompatibleCNIVersion, "incompatible CNI versions", err.Details())
	}
	if f == nil {
		return nil
	}
	if err := c.ctx.Err(); err != nil {
		return err
	}
	return f(c)
}

func (c *call) configVersion() (string, error) {
	v, err := (&version.ConfigDecoder{}).Decode(c.config)
	if err != nil {
		return "", types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	return v, nil
}

// print is a plugin's answer to ADD.
func (c *call) print(r types.Result, version string) error {
	out, err := r.GetAsVersion(version)
	if err != nil {
		return err
	}
	return out.PrintTo(&c.out)
}

// delegate runs another plugin with the same configuration.
type delegate struct {
	*call
	command string
}

// AsEnv is the environment of the plugin that is delegated to.
func (d delegate) AsEnv() []string {
	env := slices.DeleteFunc(slices.Clone(d.environ), func(kv string) bool { return strings.HasPrefix(kv, "CNI_COMMAND=") })
	return append(env, "CNI_COMMAND="+d.command)
}

func (c *call) delegateAdd(typ string) (types.Result, error) {
	program, err := c.exec.FindInPath(typ, strings.Split(c.path, ":"))
	if err != nil {
		return nil, err
	}
	return invoke.ExecPluginWithResult(c.ctx, program, c.config, delegate{c, "ADD"}, c.exec)
}

func (c *call) delegate(typ, command string) error {
	program, err := c.exec.FindInPath(typ, strings.Split(c.path, ":"))
	if err != nil {
		return err
	}
	return invoke.ExecPluginWithoutResult(c.ctx, program, c.config, delegate{c, command}, c.exec)
}

// previous is the result of the plugins before, which CHECK needs. plugin is what the reference puts before the error.
func previous(conf *types.PluginConf, plugin string) (*types100.Result, error) {
	if conf.RawPrevResult == nil {
		return nil, errors.New(plugin + "Required prevResult missing")
	}
	if err := version.ParsePrevResult(conf); err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(conf.PrevResult)
}
