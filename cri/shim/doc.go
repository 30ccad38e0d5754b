// Package shim is what the daemon and the pods' shims say to each other, and the shim itself.
//
// A shim is one small process per pod. It is the sandbox: it lives in the pod's network, IPC and UTS namespaces and in a
// cgroup named after the sandbox, is the parent of every container's init (as subreaper: a short-lived helper creates
// it), copies the containers' output to their logs and holds their terminals. It outlives the daemon.
//
// The package promises:
//   - the exit of a container is told only after all that it wrote is in its log, and is kept in a file of the bundle so
//     that it outlives the shim, too;
//   - a full disk or a slow attached client never blocks a container;
//   - messages from the other side are bounded and checked: neither side trusts the other's lengths.
//
// It does not know what a pod is, nor CRI, and links neither libcontainer nor gRPC: its size is paid once per pod.
//
// The daemon's side:
//
//	c := shim.Client{Socket: filepath.Join(run, "pods", id, "shim.sock")}
//	pid, err := c.Create(ctx, shim.CreateRequest{ID: ctr, Bundle: dir, …}, logFile)
//	err = c.Start(ctx, ctr)
//	err = c.Watch(ctx, func(s shim.State) { … })
package shim
