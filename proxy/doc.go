// Package proxy will program Services into nftables, as a drop-in for kube-proxy (`berth proxy`).
//
// It promises nothing yet: no command offers it. What is there is proxy/model, which computes without I/O from Services,
// EndpointSlices and the node what each address and port should do. What is going to be: rules made of map elements only, and
// a programmer that reads the kernel, compares, and commits the difference.
package proxy
