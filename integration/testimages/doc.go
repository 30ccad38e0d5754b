// Package testimages makes the container images of the integration tests on the machine at hand, out of Debian packages,
// a static busybox and a few lines of C, and pushes them to a registry.
//
// It promises that the repositories keep their upstream paths (pause, e2e-test-images/busybox, k8s-staging-cri-tools/...),
// so that a mirror of registry.k8s.io, gcr.io and k8s.gcr.io serves them under the names that critest and the kubelet ask
// for; and that the same inputs give the same digests.
//
// It does not promise upstream's digests: a test that names one cannot pass, and is skipped by name with that reason.
//
//	b := testimages.Builder{Registry: "127.0.0.1:5000", Busybox: busybox, Work: dir, Log: log}
//	err := b.PushAll(ctx)
package testimages
