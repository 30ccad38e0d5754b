// Package nri lets plugins of the Node Resource Interface (github.com/containerd/nri) see pods and containers come and go,
// and change containers before they are created.
//
// It promises that a plugin which hangs, dies or sends nonsense delays a call for no longer than [RequestTimeout] for each
// request and is then dropped; that an adjustment which cannot work is refused with the names of plugin and field before
// anything is made of it; that a socket which another runtime listens on is left alone; and that without a plugin a hook
// costs a lock that nobody else holds. A plugin is trusted like root, whose it is: what it asks for is not judged, only
// whether it can be.
//
// It knows pods and containers as NRI does. Who they are, and when they are told, is package pods' to say:
//
//	r, err := nri.Open(nri.Options{Socket: "/var/run/nri/nri.sock", Log: log})
//	err = r.Start(state)
//	leave, plugins := r.Enter()
//	defer leave()
//	if plugins {
//		adjust, err := r.CreateContainer(ctx, pod, container)
//	}
package nri
