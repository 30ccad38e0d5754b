// Package lab gives integration tests and the demo a node of their own on this machine: a registry with the test images, a
// bridge network, `berth serve`, a stock kubelet, with or without an API server, crictl and critest, and a ledger of what
// they leave behind.
//
// It promises that nodes live side by side: each has its own directory, ports, bridge, subnet, cgroup and firewall names,
// so that tests of several packages, or another runtime, may run at once; and that Close ends and removes all of it, also
// after a test failed.
//
// It does not promise to work without root, and starts nothing but the processes that a test asks for.
//
//	node, err := lab.New(lab.Options{})
//	defer node.Close()
//	err = node.StartRegistry(ctx)
//	err = node.StartBerth(ctx)
//	before, err := node.Snapshot()
//	... node.CRI.RunPodSandbox(ctx, ...)
//	err = node.Settle(ctx, before) // nil once everything is as it was
//
// With BERTH_TEST_CONTAINERD set the tests run against a containerd with runc that each node starts for itself, to learn
// whether a test is right; with BERTH_TEST_ENDPOINT set to a CRI endpoint, against that runtime, which has to find the test
// images itself. Options.Containerd is the same for one node: a test that compares has one of each.
package lab
