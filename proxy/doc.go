// Package proxy will be a drop-in for kube-proxy (`berth proxy`).
//
// It promises nothing yet: no command offers it. What is there is proxy/model, which computes without I/O from Services,
// EndpointSlices and the node what each address and port should do, and proxy/nft, which has nf_tables do it.
package proxy
