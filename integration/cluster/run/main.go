// Command run makes and removes the cluster of `make cluster`: run up [NODES], run down.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/berth-run/berth/integration/cluster"
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
		if err := cluster.Down(dir); err != nil {
			return err
		}
		fmt.Println("cluster: nothing of it is left")
		return nil
	case len(args) == 2 && args[0] == "up":
		nodes, err := strconv.Atoi(args[1])
		if err != nil {
			return fmt.Errorf("%q is no number of nodes (N)", args[1])
		}
		return up(ctx, dir, nodes)
	}
	return fmt.Errorf("usage: run up NODES | run down")
}

func up(ctx context.Context, dir string, nodes int) error {
	began := time.Now()
	c, err := cluster.Start(ctx, cluster.Options{Dir: dir, Nodes: nodes, Images: true, Log: func(format string, args ...any) {
		fmt.Printf("%7.2f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}})
	if err != nil {
		if c != nil {
			err = fmt.Errorf("%w\nThe rest of the logs is in %s/logs. `make cluster-down` removes what is there", err, dir)
		}
		return err
	}
	fmt.Printf(`
The cluster is there, and stays until make cluster-down. Try:

  export KUBECONFIG=%[1]s PATH=%[2]s/bin:$PATH
  kubectl get nodes -o wide
  kubectl create deployment web --image registry.k8s.io/e2e-test-images/httpd:latest --replicas 2
  kubectl expose deployment web --type NodePort --port 80
  curl http://%[3]s:$(kubectl get service web -o 'jsonpath={.spec.ports[0].nodePort}')/
  nsenter --mount=%[2]s/ns/node-1.mnt --net=%[2]s/ns/node-1.net --uts=%[2]s/ns/node-1.uts      # a shell on the first node

Its registry is http://%[4]s: what is pushed to it as PATH can be pulled as %[5]s/PATH. Logs are in %[2]s/logs.
`, c.Kubeconfig(), c.Dir, c.Nodes[0].Address(), c.Registry(), "registry.example")
	return nil
}
