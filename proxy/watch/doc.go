// Package watch keeps up with what the API server has of Services, EndpointSlices, ServiceCIDRs and the node's own Node, with
// kube-proxy's selectors, and hands on what has changed.
//
//	client, err := watch.NewClient(watch.ClientOptions{Kubeconfig: "/etc/kubernetes/proxy.conf"})
//	w := watch.New(client, watch.Options{Node: "node-1"})
//	go w.Run(ctx)
//	for {
//		batch, err := w.Next(ctx) // at once if there is something, however little
//		batch.Apply(m)            // into a model
//	}
//
// It promises that the first batch is all there is: nothing is handed on before Services, slices, ServiceCIDRs and the Node
// have been listed. After it, a change is handed on at once, and what changes until the next call goes together, the last
// word of each object alone; there is no delay. What the API server does not say stays as it was: while it is slow or gone,
// when it refuses or breaks off a list, or sends one without a revision, there is no batch. Once it answers again, what has
// gone meanwhile is deleted.
//
// No object is kept once it was handed on, only its name. It does not judge objects: the model does.
package watch
