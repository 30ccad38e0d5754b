// Package cadvisor answers what cAdvisor, inside a kubelet, asks of containerd: three calls of containerd's API, on
// containerd's own socket. With default gates the kubelet takes a pod's network counters, process counts and the labels of
// /metrics/cadvisor from there, and not from the CRI; a runtime that does not answer is blind in every dashboard.
//
// It promises:
//   - nothing can be changed through it, and nothing of a container's environment is told;
//   - messages are bounded: names, labels of Kubernetes', numbers;
//   - a panic in one call fails that call and no other.
//
// It does not promise to be containerd: all other calls are Unimplemented, so that a client which needs them fails at once.
//
// A kubelet that runs while the daemon restarts connects again by itself, after up to three seconds; pods that start
// meanwhile may have no labels in /metrics/cadvisor, since cAdvisor asks once for each.
//
//	l, err := socket.Listen(ctx, "/run/containerd/containerd.sock")
//	server := cadvisor.New(cadvisor.Options{Pods: pods.Born{Manager: manager}, Image: image, SandboxImage: "berth-shim", Log: log})
//	err = server.Serve(ctx, l)
package cadvisor
