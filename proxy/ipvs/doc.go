// Package ipvs removes what a former kube-proxy has left in its mode ipvs; berth has no such mode.
//
//	removed, err := ipvs.Remove() // in the network namespace of the calling thread
//
// It promises that only kube-proxy's goes: virtual servers at addresses of the link kube-ipvs0 or at node ports that its sets name,
// so that those of another program (keepalived, in front of API servers) stay; the link; the sets KUBE-*, once no rule refers to
// them, so that its chains have to be removed first (package iptables). Where nothing of it is there, no module of the kernel is loaded.
package ipvs
