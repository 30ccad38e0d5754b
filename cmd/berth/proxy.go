package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	serveconfig "github.com/berth-run/berth/cmd/berth/internal/config"
	"github.com/berth-run/berth/internal/version"
	"github.com/berth-run/berth/proxy"
	"github.com/berth-run/berth/proxy/config"
	"github.com/berth-run/berth/proxy/conntrack"
	"github.com/berth-run/berth/proxy/explain"
	"github.com/berth-run/berth/proxy/health"
	"github.com/berth-run/berth/proxy/loopback"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
	"github.com/berth-run/berth/proxy/watch"
)

func proxyCommand() *cobra.Command {
	var flags config.Flags
	var own proxyFlags
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "Have Services reached from this node, in place of kube-proxy",
		Long: "Have Services reached from this node, in place of kube-proxy, by nf_tables or iptables, until SIGTERM or SIGINT. The rules stay then:\n" +
			"connections and Services go on, and the next start changes only what differs. --cleanup removes them.\n\n" +
			"Configuration and flags are kube-proxy's: a KubeProxyConfiguration, or flags, which beside --config do not count but for\n" +
			"--hostname-override, --master, -v and --logging-format.",
		Example: "  berth proxy --config /var/lib/kube-proxy/config.conf --hostname-override node-1\n" +
			"  berth proxy --kubeconfig /etc/kubernetes/proxy.conf --cluster-cidr 10.244.0.0/16\n" +
			"  berth proxy --cleanup",
		Args: cobra.NoArgs,
	}
	flags.Add(cmd.Flags())
	own.add(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if flags.Cleanup {
			return cleanProxy(cmd, proxy.Cleanup)
		}
		if own.cleanup {
			err := cleanProxy(cmd, proxy.CleanupOwn)
			for _, what := range proxy.OwnLeft() {
				fmt.Fprintf(cmd.ErrOrStderr(), "berth: left %s: it is in force, since no kube-proxy has taken it over; start that first, or remove all by --cleanup\n", what)
			}
			return err
		}
		c, err := flags.Load()
		if err != nil {
			return err
		}
		if flags.WriteConfigTo != "" {
			text, err := yaml.Marshal(c.Proxy)
			if err != nil {
				return err
			}
			return os.WriteFile(flags.WriteConfigTo, text, 0o644)
		}
		if flags.InitOnly {
			return initProxy(c, &own)
		}
		return runProxy(cmd.Context(), c, &own)
	}
	return cmd
}

// proxyFlags are berth's own, which count beside --config, too.
type proxyFlags struct {
	counters bool
	resets   bool
	socket   string
	cleanup  bool
}

func (f *proxyFlags) add(set *pflag.FlagSet) {
	set.BoolVar(&f.counters, "service-counters", true, "count new connections, rejections and drops of each Service's port, for /metrics")
	set.BoolVar(&f.cleanup, "cleanup-own", false, "remove the rules of berth alone, beside a kube-proxy that runs again, and end")
	set.BoolVar(&f.resets, "reset-connections", false, "reset established connections to endpoints that are gone from their Service, unless its annotation "+model.ResetAnnotation+" is false; without, where that is true (mode nftables)")
	set.StringVar(&f.socket, "socket", explain.Socket, "`path` of the socket that berth explain asks at; empty for none")
}

// initProxy does what may want more rights than a proxy has: sysctls, which a container without privileges finds read-only, and having
// the kernel load its modules. The sysctl route_localnet of mode iptables is not among them: before there are rules it would open the
// node's loopback to its neighbours.
func initProxy(c *config.Config, own *proxyFlags) error {
	log := proxyLogger(c)
	kernel, err := openKernel(c, own, nil, log)
	if err != nil {
		return err
	}
	return errors.Join(kernel.Close(), proxy.SetConntrack("/", &c.Proxy.Conntrack, log))
}

// cleanProxy says what it has removed, also where it could not remove the rest.
func cleanProxy(cmd *cobra.Command, clean func() ([]string, error)) error {
	removed, err := clean()
	for _, what := range removed {
		fmt.Fprintln(cmd.OutOrStdout(), "removed", what)
	}
	if who := proxy.Running(cmd.Context()); who != "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "berth: a berth proxy runs (%s), and makes its rules again: stop it, then clean up\n", who)
	}
	return err
}

// proxyGCPercent has garbage collected twice as often as programs do otherwise: a proxy that has loaded its Services makes little of it,
// and is on each node for its memory.
const proxyGCPercent = 50

// runProxy runs the proxy: its parts end together.
func runProxy(ctx context.Context, c *config.Config, own *proxyFlags) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(proxyGCPercent)
	}
	log := proxyLogger(c)
	if len(c.Ignored) > 0 {
		log.Warn("flags do not count beside --config", "flags", strings.Join(c.Ignored, " "), "config", c.File)
	}
	node, err := c.NodeName()
	if err != nil {
		return err
	}
	client, err := watch.NewClient(watch.ClientOptions{
		Kubeconfig: c.Proxy.ClientConnection.Kubeconfig, Master: c.Master,
		ContentType: c.Proxy.ClientConnection.ContentType, AcceptContentTypes: c.Proxy.ClientConnection.AcceptContentTypes,
		QPS: c.Proxy.ClientConnection.QPS, Burst: int(c.Proxy.ClientConnection.Burst),
	})
	if err != nil {
		return err
	}
	ctx, stop := interrupted(ctx)
	defer stop()
	var claim *os.File // what tells the next proxy that this one, or what it has started, has not ended
	name, err := proxy.Take(ctx, log)
	switch {
	case errors.Is(err, proxy.ErrClaimed):
		return err
	case ctx.Err() != nil:
		return nil
	case err != nil:
		log.Warn("a second berth proxy in this network namespace would not be noticed", "error", err)
	default:
		defer name.Close()
		if claim, err = name.File(); err != nil {
			return err
		}
		defer claim.Close()
	}
	kernel, err := openKernel(c, own, claim, log)
	if err != nil {
		return err
	}
	families := kernel.families
	for _, s := range c.Unused() {
		log.Warn("a setting has no effect", "setting", s)
	}
	services := c.Model(node, true, len(families) > 1)
	program.AbilitiesOf(kernel).Limit(&services)
	if services.Resets = own.resets; services.Resets && services.NoResets {
		log.Warn("--reset-connections has no effect: connections to endpoints that are gone end when one side notices; it needs mode nftables, and a kernel with nft_reject and nft_ct", "mode", kernel.mode)
	}
	m, err := model.New(services)
	if err != nil {
		return err
	}
	prepareHost(c, log)
	log.Info("berth proxy starts", "node", node, "mode", kernel.mode, "families", strings.Join(families, " "), "version", version.String())
	o := proxy.Options{
		Model: m, Look: &sync.Mutex{}, Programmer: kernel, Programmed: kernel.alone, Period: c.SyncPeriod(), Log: log,
		Health: health.New(2*c.SyncPeriod(), families...), Metrics: health.NewMetrics(families...),
		Events: health.NewEvents(node, client, log),
	}
	explains := &explain.Server{
		Model: m, Look: o.Look, Mode: kernel.mode, Inspector: kernel.inspector, Counters: kernel.counted, Healthy: o.Health.Healthy, Host: explain.Node{},
	}
	if kernel.restores != nil {
		o.Metrics.IPTables(kernel.restores)
	} else {
		o.Metrics.NFTables()
	}
	if kernel.counted != nil {
		o.Metrics.Counters(kernel.counted)
	}
	if ipv4, ipv6 := c.LoopbackNodePorts(); ipv4 || ipv6 {
		o.Loopback = loopback.New(loopback.Options{
			IPv4: ipv4, IPv6: ipv6 && len(families) > 1, Failed: o.LoopbackFailed, Log: log,
			Listening: o.Metrics.LoopbackListening, Refused: o.Metrics.LoopbackRefused,
		})
		explains.Loopback = o.Loopback.Listens
	}
	cleaner := conntrack.New(conntrack.Options{Log: log, Swept: o.Metrics.ConntrackSwept, Resets: kernel.resets, Reset: o.Metrics.ConnectionsReset})
	o.Conntrack = cleaner
	o.NodePorts = &health.NodePorts{Healthy: o.Health.Healthy, Failed: o.PortFailed, Log: log}
	w := watch.New(client, watch.Options{Node: node, Log: log, Queued: o.Queued})
	o.Source, explains.Silent = w, w.Silent
	err = together(ctx,
		func(ctx context.Context) error { w.Run(ctx); return nil },
		func(ctx context.Context) error { o.Events.Run(ctx); return nil },
		func(ctx context.Context) error { proxy.Run(ctx, o); return nil },
		func(ctx context.Context) error { cleaner.Run(ctx); return nil },
		func(ctx context.Context) error { return serveHealth(ctx, c, &o, log) },
		func(ctx context.Context) error { return serveMetrics(ctx, kernel.mode, c, &o, log) },
		func(ctx context.Context) error { serveExplain(ctx, own.socket, explains, log); return nil },
	)
	log.Info("berth proxy stops, its rules stay")
	return errors.Join(err, kernel.Close())
}

// together runs all until the context ends or one of them fails, and returns when none is left.
func together(ctx context.Context, parts ...func(context.Context) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var all sync.WaitGroup
	errs := make([]error, len(parts))
	for i, part := range parts {
		all.Go(func() {
			if errs[i] = part(ctx); errs[i] != nil {
				stop(errs[i])
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

func serveHealth(ctx context.Context, c *config.Config, o *proxy.Options, log *slog.Logger) error {
	if c.Proxy.HealthzBindAddress == "" {
		return nil
	}
	return health.Serve(ctx, "health", c.Proxy.HealthzBindAddress, o.Health.Handler(o.Metrics), c.Proxy.BindAddressHardFail, log)
}

func serveMetrics(ctx context.Context, mode string, c *config.Config, o *proxy.Options, log *slog.Logger) error {
	if c.Proxy.MetricsBindAddress == "" {
		return nil
	}
	pages := health.Pages{Metrics: o.Metrics, Mode: mode, Config: c.Proxy, Profiling: c.Proxy.EnableProfiling}
	return health.Serve(ctx, "metrics", c.Proxy.MetricsBindAddress, pages.Handler(), c.Proxy.BindAddressHardFail, log)
}

// serveExplain answers questions. Services are reached without it.
func serveExplain(ctx context.Context, at string, s *explain.Server, log *slog.Logger) {
	if at == "" {
		return
	}
	if err := s.Serve(ctx, at, log); err != nil {
		log.Warn("berth explain cannot ask this proxy", "error", err)
	}
}

// prepareHost sets what is the host's. None of it keeps Services from being reached.
func prepareHost(c *config.Config, log *slog.Logger) {
	if err := proxy.SetConntrack("/", &c.Proxy.Conntrack, log); err != nil {
		log.Warn("conntrack is not as configured", "error", err)
	}
	score := strconv.Itoa(int(*c.Proxy.OOMScoreAdj))
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(score), 0o644); err != nil {
		log.Warn("oomScoreAdj is not set", "score", score, "error", err)
	}
}

// proxyLogger has kube-proxy's level and format.
func proxyLogger(c *config.Config) *slog.Logger {
	level := "info"
	if c.Proxy.Logging.Verbosity >= 4 {
		level = "debug"
	}
	return logger(&serveconfig.Config{LogLevel: level, LogFormat: c.Proxy.Logging.Format})
}
