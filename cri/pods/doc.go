// Package pods is the life of pod sandboxes and containers: their records, the steps that make and unmake them, what
// their shims tell of them, and what is made of all that after the daemon or the node was restarted.
//
// It is the only place where images, network, cgroups and shims meet. It promises:
//   - a record names whatever exists before it exists, so that after kill -9 at any instant [Open] finishes or undoes
//     what was under way, and no name, address, mount, cgroup or process is lost;
//   - failure, removal and recovery run the same undo (package step), even when the caller has gone;
//   - one lock per pod: a step that hangs holds up its own pod and no other;
//   - lists and statuses come from memory: nothing is asked of a disk or a shim.
//
// It does not validate requests beyond what it needs (package spec does), and knows nothing of gRPC: its errors are of
// the classes of github.com/containerd/errdefs.
//
//	m, err := pods.Open(ctx, pods.Options{Root: "/var/lib/berth", Run: "/run/berth", Images: store, …})
//	id, err := m.RunSandbox(ctx, config, "")
package pods
