// Command run makes and removes the cluster of `make cluster`: check or up NODES [ADDON ...], start NODE, down.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := do(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "cluster: %v\n", err)
		stop()
		os.Exit(1) //nolint:gocritic // stop was called, and nothing else is deferred
	}
}

func do(ctx context.Context, args []string) error {
	dir := os.Getenv("BERTH_CLUSTER_DIR")
	if dir == "" {
		dir = cluster.DefaultDir
	}
	switch {
	case len(args) == 1 && args[0] == "down":
		if err := errors.Join(cluster.Down(dir), cluster.Sweep(0)); err != nil {
			return err
		}
		fmt.Println("cluster: nothing of it is left")
		return nil
	case len(args) == 2 && args[0] == "start":
		return start(ctx, dir, args[1])
	case len(args) >= 2 && (args[0] == "check" || args[0] == "up"):
		options, wanted, err := asked(dir, args[1], args[2:])
		switch {
		case err != nil:
			return err
		case args[0] == "check":
			return options.Check()
		}
		return up(ctx, options, wanted)
	}
	return errors.New("usage: cluster check|up NODES [ADDON ...] | cluster start NODE | cluster down")
}

// asked are options and add-ons of a cluster by the arguments, or says what is wrong with them.
func asked(dir, nodes string, wanted []string) (cluster.Options, []string, error) {
	n, err := strconv.Atoi(nodes)
	if err != nil || n == 0 { // which is the default of Options
		return cluster.Options{}, nil, fmt.Errorf("N: %q is no number of nodes, 1 to 9", nodes)
	}
	if !slices.Contains(wanted, "dns") {
		wanted = append([]string{"dns"}, wanted...)
	}
	for _, name := range wanted {
		if addons[name] == nil {
			return cluster.Options{}, nil, fmt.Errorf("ADDONS: %q is none of %s", name, strings.Join(slices.Sorted(maps.Keys(addons)), ", "))
		}
	}
	return cluster.Options{Dir: dir, Nodes: n, Images: true}, wanted, nil
}

// timed tells of steps with the time since it was made.
func timed() func(string, ...any) {
	began := time.Now()
	return func(format string, args ...any) {
		fmt.Printf("%7.2f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
}

// start starts what does not run on a node, and waits until the node is Ready.
func start(ctx context.Context, dir, name string) error {
	log := timed()
	c, err := cluster.Open(dir, log)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is no cluster's directory: make cluster makes one", dir)
	}
	if err != nil {
		return err
	}
	i := slices.IndexFunc(c.Nodes, func(n *cluster.Node) bool { return n.Name == name })
	if i < 0 {
		return fmt.Errorf("node: %q is none of node-1 to %s", name, c.Nodes[len(c.Nodes)-1].Name)
	}
	if err := c.Nodes[i].Start(ctx); err != nil {
		return fmt.Errorf("%w\nWhat was started runs on, and the same command goes on from there", err)
	}
	if err := c.Nodes[i].WaitReady(ctx, 2*time.Minute); err != nil {
		return err
	}
	log("%s is Ready, and all its daemons run", name)
	return nil
}

// addons are what a cluster may be given, by the names of build.sh, and how.
var addons = map[string]func(context.Context, *cluster.Cluster, *lab.Tools) error{
	"dns": func(ctx context.Context, c *cluster.Cluster, t *lab.Tools) error { return c.StartDNS(ctx, t.DNS) },
	"traefik": func(ctx context.Context, c *cluster.Cluster, t *lab.Tools) error {
		return c.StartIngress(ctx, t.Traefik)
	},
	"metrics-server": func(ctx context.Context, c *cluster.Cluster, t *lab.Tools) error {
		return c.StartMetrics(ctx, t.MetricsServer)
	},
}

func up(ctx context.Context, options cluster.Options, wanted []string) error {
	tools, err := lab.BuildTools(ctx, os.Stderr, wanted...)
	if err != nil {
		return err
	}
	options.Log = timed()
	c, err := cluster.Start(ctx, options)
	if err == nil {
		err = furnish(ctx, c, wanted, tools, options.Log)
	}
	if err != nil {
		if c != nil {
			err = fmt.Errorf("%w\nThe rest of the logs is in %s/logs. `make cluster-down` removes what is there", err, options.Dir)
		}
		return err
	}
	fmt.Printf(`
The cluster is there, and stays until make cluster-down. Try:

  export KUBECONFIG=%[1]s PATH=%[2]s/bin:$PATH
  kubectl get nodes -o wide
  kubectl create deployment hello --image registry.k8s.io/e2e-test-images/httpd:latest --replicas 2
  kubectl expose deployment hello --type NodePort --port 80
  kubectl rollout status deployment hello
  curl http://%[3]s:$(kubectl get service hello -o 'jsonpath={.spec.ports[0].nodePort}')/
  kubectl apply -f examples/web/web.yaml                                  # a page, a log collector and an exporter of metrics
  nsenter --mount=%[2]s/ns/node-1.mnt --net=%[2]s/ns/node-1.net --uts=%[2]s/ns/node-1.uts      # a shell on the first node
  make cluster-start NODE=node-1                                          # daemons that you have killed there run again

Its registry is http://%[4]s: what is pushed to it as PATH (skopeo copy --dest-tls-verify=false SOURCE docker://%[4]s/PATH)
can be pulled as registry.example/PATH. Logs are in %[2]s/logs. More: docs/cluster.md
`, c.Kubeconfig(), c.Dir, c.Nodes[0].Address(), c.Registry())
	return nil
}

// furnish pushes the image of examples/web, and starts add-ons.
func furnish(ctx context.Context, c *cluster.Cluster, wanted []string, tools *lab.Tools, log func(string, ...any)) error {
	if err := c.PushExample(ctx); err != nil {
		return fmt.Errorf("image of examples/web: %w", err)
	}
	log("the image of examples/web is pushed")
	for _, name := range wanted {
		if err := addons[name](ctx, c, tools); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		log("%s is ready", name)
	}
	return nil
}
