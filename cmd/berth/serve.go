package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cmd/berth/internal/config"
	"github.com/berth-run/berth/cmd/berth/internal/host"
	"github.com/berth-run/berth/cri"
	"github.com/berth-run/berth/cri/cdi"
	"github.com/berth-run/berth/cri/nri"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/cri/streaming"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/internal/socket"
	"github.com/berth-run/berth/internal/version"
	"github.com/berth-run/berth/network"
	"github.com/berth-run/berth/network/routes"
)

// configDir is where the default configuration is.
const configDir = "/etc/berth"

func serveCommand() *cobra.Command {
	var (
		file    string
		cniBin  string
		cdiDirs string
		c       = config.Default()
	)
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the Container Runtime Interface to a kubelet",
		Long: "Serve the Container Runtime Interface to a kubelet, until SIGTERM or SIGINT. Pods go on running then, and are\n" +
			"taken up again by the next start. Flags win over the configuration files, those win over the defaults.\n\n" +
			"Configuration files are YAML and have each setting by the name of its flag in camelCase: cniConf for --cni-conf.\n" +
			"Directories and limits, of which there may be several, are lists there. crictl info shows what is in force.\n\n" +
			"Beside --socket berth makes sockets for the kubelet's cAdvisor and for NRI plugins, in directories that it shares with\n" +
			"other runtimes. What another program listens on it leaves alone, and says so; \"" + config.Disabled + "\" makes none.",
		Example: "  berth serve\n" +
			"  berth serve --root /srv/berth --run /run/berth2 --cadvisor-socket " + config.Disabled + " --nri-socket " + config.Disabled + "\n" +
			"  berth serve --config /etc/berth/other.yaml --log-level debug",
		Args: cobra.NoArgs,
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "configuration `file` (default "+configDir+"/config.yaml and "+configDir+"/config.d/*.yaml, where they exist)")
	f.StringVar(&c.Root, config.Flag("root"), c.Root, "`directory` of what survives a reboot: images, records, writable layers")
	f.StringVar(&c.WritableRoot, config.Flag("writableRoot"), "", "`directory` of what containers write, where that is to be on another file system than the images (default in --root)")
	f.StringVar(&c.Run, config.Flag("run"), c.Run, "`directory` of what does not survive it, on a tmpfs")
	f.StringVar(&c.Socket, config.Flag("socket"), "", "unix socket `path` for the kubelet (default berth.sock in --run)")
	f.StringVar(&c.CertsD, config.Flag("certsD"), c.CertsD, "`directory` of HOST/hosts.toml, how to reach registries, or several, separated by colons: the first that has a registry's counts")
	f.StringVar(&c.WhenRegistryDown, config.Flag("whenRegistryDown"), c.WhenRegistryDown, "`what` a pull does while its registry does not answer: fail, or take the image of that name that is local (with a warning)")
	f.StringVar(&c.LayerBlobs, config.Flag("layerBlobs"), c.LayerBlobs, "`what` becomes of compressed layers once they are unpacked: drop, or keep, so that images are exported byte for byte as they were pulled")
	f.StringVar(&c.MaxLayerBytes, config.Flag("maxLayerBytes"), c.MaxLayerBytes, "`bytes` that a layer of an image may unpack to")
	f.StringVar(&c.MaxLayerEntries, config.Flag("maxLayerEntries"), c.MaxLayerEntries, "`number` of files, directories and links that a layer of an image may have")
	f.StringVar(&c.MinPullRate, config.Flag("minPullRate"), c.MinPullRate, "`bytes` a second that a connection to a registry must bring, over half a minute; one that brings less is given up")
	f.StringVar(&c.CNIConf, config.Flag("cniConf"), c.CNIConf, "`directory` of the CNI configuration")
	f.StringVar(&cniBin, config.Flag("cniBin"), strings.Join(c.CNIBin, ":"), "`directories` of the CNI plugins, separated by colons")
	f.StringVar(&c.PodCIDR, config.Flag("podCIDR"), c.PodCIDR, "`ranges` of addresses of the default network, which pods get where --cni-conf has none: "+config.Kubelet+", those that it hands over; or CIDR, or IPv4-CIDR,IPv6-CIDR; or \""+config.Disabled+"\"")
	f.StringVar(&c.NodeRoutes, config.Flag("nodeRoutes"), c.NodeRoutes, "`how` pods of other nodes are reached where pods have the default network: "+strings.Join(routes.Modes(), ", ")+"; host-gw is by nodes in the same subnet, vxlan through a tunnel, auto by what fits")
	f.StringVar(&c.Kubeconfig, config.Flag("kubeconfig"), "", "`file` that leads to the API server, for --node-routes; its user may list and watch Nodes")
	f.StringVar(&c.NodeName, config.Flag("nodeName"), "", "`name` of this node's object, for --node-routes (default the host's name in lower case)")
	f.StringSliceVar(&c.CNIExec, config.Flag("cniExec"), nil, "`types` of CNI plugins whose programs are run, separated by commas, or "+network.ExecAll+"; else "+strings.Join(network.InProcess(), ", ")+" are answered in process, where their programs are the reference plugins or are not there")
	f.StringVar(&cdiDirs, config.Flag("cdiSpecDirs"), strings.Join(c.CDISpecDirs, ":"), "`directories` of CDI device specifications, separated by colons; none if empty")
	f.StringVar(&c.CgroupDriver, config.Flag("cgroupDriver"), c.CgroupDriver, "`who` makes cgroups: cgroupfs, systemd, or auto, which is systemd where that is process 1")
	f.StringSliceVar(&c.DefaultUlimits, config.Flag("defaultUlimits"), nil, "resource `limits` of containers, NAME=SOFT:HARD, separated by commas; those not named are the daemon's")
	f.StringVar(&c.SELinux, config.Flag("selinux"), c.SELinux, "`whether` pods get SELinux labels: auto, where the kernel has SELinux on, or "+config.Disabled)
	f.StringVar(&c.SELinuxRelabel, config.Flag("selinuxRelabel"), c.SELinuxRelabel, "`when` a volume is relabelled that has to have a container's SELinux label: always, or once, which takes one whose root has it to have it throughout")
	f.StringVar(&c.StreamIdle, config.Flag("streamIdle"), c.StreamIdle, "`time` without a byte after which an exec, attach or port-forward is cut")
	f.StringVar(&c.CadvisorSocket, config.Flag("cadvisorSocket"), c.CadvisorSocket, "unix socket `path` where a kubelet's cAdvisor asks for containers, or \""+config.Disabled+"\"")
	f.StringVar(&c.NRISocket, config.Flag("nriSocket"), c.NRISocket, "unix socket `path` for plugins of NRI, or \""+config.Disabled+"\"")
	f.StringVar(&c.NRIPlugins, config.Flag("nriPlugins"), c.NRIPlugins, "`directory` of plugins of NRI that are started with the daemon")
	f.StringVar(&c.NRIConfig, config.Flag("nriConfig"), c.NRIConfig, "`directory` of the configuration of plugins of NRI")
	f.StringVar(&c.LogLevel, config.Flag("logLevel"), c.LogLevel, "`level`: debug, info, warn or error")
	f.StringVar(&c.LogFormat, config.Flag("logFormat"), c.LogFormat, "`format`: text or json")
	f.StringVar(&c.Shim, config.Flag("shim"), "", "berth-shim `program` (default the one beside berth)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c.CNIBin = strings.Split(cniBin, ":")
		c.CDISpecDirs = nil
		if cdiDirs != "" {
			c.CDISpecDirs = strings.Split(cdiDirs, ":")
		}
		files, err := config.Files(file, configDir)
		if err != nil {
			return err
		}
		given := func(name string) bool { return cmd.Flags().Changed(config.Flag(name)) }
		loaded, err := config.Load(files, c, given)
		if err != nil {
			return err
		}
		return serve(cmd.Context(), loaded)
	}
	return cmd
}

// serve runs the daemon: what is opened in one order is closed in the other.
func serve(ctx context.Context, c *config.Config) (err error) {
	log := logger(c)
	kernel, err := host.Check()
	if err != nil {
		return err
	}
	if c.Shim == "" {
		if c.Shim, err = besideThis("berth-shim"); err != nil {
			return err
		}
	}
	if err := host.CheckShim(c.Shim); err != nil {
		return err
	}
	driver, err := cgroups.ChooseDriver(c.CgroupDriver)
	if err != nil {
		return err
	}
	rlimits, err := spec.ParseRlimits(c.DefaultUlimits)
	if err != nil {
		return err
	}
	lock, err := host.Claim(c.Root, c.Run)
	if err != nil {
		return err
	}
	closing := func(name string, f func() error) {
		if cerr := f(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("close %s: %w", name, cerr))
		}
	}
	defer closing("lock", lock.Release)

	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// Where standard error is a pipe whose reader has gone (a restarted journald), a log line must not kill the daemon. It
	// is caught, not ignored: an ignored signal would stay so in every process that it starts, containers included.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)

	warnOfCertsD(log, c.CertsD)
	store, err := images.Open(storeOptions(c, log))
	if err != nil {
		return err
	}
	defer closing("images", store.Close)
	net, err := network.Open(network.Options{
		ConfDir: c.CNIConf, BinDirs: c.CNIBin, Exec: c.CNIExec, CacheDir: filepath.Join(c.Root, "cni"), Log: log,
		PodCIDRs: c.PodCIDRs(), PodCIDRFile: filepath.Join(c.Root, "podcidr"), NoDefault: c.PodCIDR == "",
		NamespaceDir: filepath.Join(c.Run, "netns"),
		Tunnelled:    routes.Mode(c.NodeRoutes).Tunnelled(), NodeLinks: routes.Links(),
		RunDir: filepath.Join(c.Run, "cni"),
	})
	if err != nil {
		return err
	}
	defer closing("network", net.Close)
	nodeRoutes, err := startRoutes(c, net, log)
	if err != nil {
		return err
	}
	defer closing("node routes", nodeRoutes.Close)
	manager, err := pods.Open(ctx, pods.Options{
		Root: c.Root, Run: c.Run, ShimPath: c.Shim, Images: store, Network: net,
		Cgroups: driver, Rlimits: rlimits, NoSELinux: c.SELinux == config.Disabled, RelabelOnce: c.SELinuxRelabel == config.Once,
		Log: log, Observe: steps(log),
		CDI: cdi.Registry{Dirs: c.CDISpecDirs},
		NRI: nri.Options{Socket: c.NRISocket, Plugins: c.NRIPlugins, Config: c.NRIConfig, Version: version.Version},
	})
	if err != nil {
		return err
	}
	defer manager.Close()
	stream, err := streaming.Listen(ctx, streaming.Options{Runtime: manager, Idle: c.Idle(), Log: log})
	if err != nil {
		return err
	}
	defer closing("streaming", stream.Close)

	server := cri.New(cri.Options{
		Pods: manager, Images: store, Network: net, Streaming: stream,
		CgroupDriver:      driver,
		RecursiveReadOnly: !kernel.Less(host.RecursiveReadOnly),
		UserNamespaces:    manager.UserNamespaces() == nil,
		Info:              shown(c, driver),
		NodeRoutes:        func() any { return nodeRoutes.State() },
		Log:               log,
	})
	listener, err := socket.Listen(ctx, c.Socket)
	if err != nil {
		return err
	}
	endAnswers := answerCadvisor(ctx, log, c.CadvisorSocket, c.Socket, manager, store)
	defer endAnswers()
	endTools := answerTools(ctx, log, c.AdminSocket(), store)
	defer endTools()
	endRounds := watchPulls(ctx, log, store)
	defer endRounds()
	log.Info("berth serves", "socket", c.Socket, "root", c.Root, "run", c.Run, "version", version.String(), "kernel", kernel.String())
	notify(log, daemon.SdNotifyReady)
	err = server.Serve(ctx, listener)
	notify(log, daemon.SdNotifyStopping)
	log.Info("berth stops, pods go on running")
	return err
}

// startRoutes keeps the routes to other nodes' pods. A daemon that is not to have any removes those that it had.
func startRoutes(c *config.Config, net *network.Manager, log *slog.Logger) (*routes.Agent, error) {
	name := c.NodeName
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("name of the node (--node-name gives it): %w", err)
		}
		name = strings.ToLower(strings.TrimSpace(host))
	}
	return routes.Start(routes.Options{
		Mode: routes.Mode(c.NodeRoutes), Kubeconfig: c.Kubeconfig, Node: name, Note: filepath.Join(c.Root, "noderoutes"),
		Network: net.Default, NetworkChanges: net.Changes(), Log: log,
	})
}

// warnOfCertsD says which directories of registry configuration are none: pulls go past them without a word (containerd#12636).
func warnOfCertsD(log *slog.Logger, certsD string) {
	if certsD == config.Default().CertsD {
		return // of most nodes, which have none
	}
	for _, dir := range filepath.SplitList(certsD) {
		info, err := os.Stat(dir)
		if err == nil && !info.IsDir() {
			err = syscall.ENOTDIR
		}
		if err != nil {
			log.Warn("there is no registry configuration in this directory", "certsD", dir, "error", err)
		}
	}
}

func storeOptions(c *config.Config, log *slog.Logger) images.Options {
	return images.Options{
		Root: filepath.Join(c.Root, "images"), CertsD: c.CertsD, LocalWhenUnavailable: c.WhenRegistryDown == config.Local,
		Writable: c.WritableStore(), KeepBlobs: c.LayerBlobs == config.Keep,
		MaxLayerBytes: config.Amount(c.MaxLayerBytes), MaxLayerEntries: config.Amount(c.MaxLayerEntries),
		MinPullRate: config.Amount(c.MinPullRate),
		Log:         log, Observe: steps(log),
	}
}

// shown is the configuration as a verbose Status shows it: every option, with the value in force. Tests of user namespaces
// (critest) look for the directory of root file systems beside stateDir, as containerd has it.
func shown(c *config.Config, driver cgroups.Driver) map[string]any {
	all := c.Values()
	all["cgroupDriver"] = driver // what auto has come to
	all["stateDir"] = filepath.Join(c.Run, "containers")
	return all
}

// notify tells systemd, where it has started us.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd was not told", "state", state, "error", err)
	}
}

// besideThis is the path of another program of this installation.
func besideThis(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("path of berth: %w: name the shim with --shim", err)
	}
	return filepath.Join(filepath.Dir(self), name), nil
}
