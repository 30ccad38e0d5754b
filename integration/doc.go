// Package integration tests berth as a node sees it: with a stock kubelet, crictl and critest, the reference CNI plugins
// and a real registry, through the sockets that users have. It needs root, and leaves nothing behind.
//
//	make test-integration
//	go test -tags integration ./integration -run 'TestKubelet/probes'
//
// Package lab makes the nodes that the tests run on, package testimages their images, and integration/tools the programs.
package integration
