// Package cluster makes a Kubernetes cluster on this machine, of real parts: etcd, API server, scheduler, controller manager, a
// registry, and nodes that run a stock kubelet, `berth serve` and `berth proxy`, or containerd and kube-proxy, to compare.
//
// It promises that a node is in network, mount and UTS namespaces of its own, with a hostname, /run, /var and /etc/hosts of its own
// and a cgroup of its own, in which are all its daemons and pods; that nodes and the API server see each other through one bridge
// only; that certificates are checked everywhere, the authorizers are Node and RBAC with NodeRestriction, and berth has no more
// rights than the manifests in examples/ give; and that Down, also by another process and after whatever went wrong, leaves no
// process, mount, namespace, link, cgroup and file behind.
//
// It does not promise that nodes cannot hurt each other: they share the kernel, its time, its devices and what is not in a
// namespace. The parts outlive the process that started them.
//
//	c, err := cluster.Start(ctx, cluster.Options{Dir: dir, Index: 1})
//	defer cluster.Down(dir)
//	out, err := c.Kubectl(ctx, "get", "nodes")
package cluster
