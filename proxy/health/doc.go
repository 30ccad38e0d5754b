// Package health is what a proxy tells others of itself: /healthz and /livez for load balancers and the kubelet, the health
// check node ports of Services, /metrics with kube-proxy's names, /configz, /proxyMode, and Events.
//
// It promises kube-proxy 1.37's answers, by status, header and fields:
//
//	h := health.New(2*syncPeriod, "IPv4", "IPv6")
//	h.Queued()              // something has changed
//	done := h.Begin()       // it is being programmed
//	done(err == nil)        // the kernel has it, or not
//	http.Serve(l, h.Handler(metrics))
//
// It decides nothing about Services: what the node ports answer is the model's word.
package health
