// Package proxy will program Services into nftables, as a drop-in for kube-proxy (`berth proxy`).
//
// It promises nothing yet: there is no code here, and no command offers it. What it is going to be: a model, computed
// without I/O from Services, EndpointSlices and the node, of what each address and port should do; rules made of map
// elements only; and a programmer that reads the kernel, compares, and commits the difference.
package proxy
