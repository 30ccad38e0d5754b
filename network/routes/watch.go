package routes

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/berth-run/berth/internal/version"
)

// kubeconfigEvery is how often a kubeconfig is looked for that is not there: a node's comes when it joins its cluster.
const kubeconfigEvery = 2 * time.Second

// watcher keeps the Node objects of the cluster.
type watcher struct {
	kubeconfig string
	log        *slog.Logger
	// changed has a value when list may return something else.
	changed chan struct{}

	mu       sync.Mutex
	informer cache.SharedIndexInformer
	silent   bool // the API server does not answer
	server   []netip.Addr
}

// run watches until the context ends.
func (w *watcher) run(ctx context.Context) {
	client := w.client(ctx)
	if client == nil {
		return
	}
	informer := cache.NewSharedIndexInformer(w.listWatch(client), &corev1.Node{}, 0, nil)
	_ = informer.SetTransform(strip) // the informer has not started
	_ = informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) { w.answers(ctx, err) })
	poked := func() { poke(w.changed) }
	_, _ = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { poked() }, DeleteFunc: func(any) { poked() },
		UpdateFunc: func(before, after any) { // a status is written every few minutes
			b, _ := before.(*corev1.Node)
			a, _ := after.(*corev1.Node)
			if b == nil || a == nil || !reflect.DeepEqual(fromObject(b), fromObject(a)) {
				poked()
			}
		},
	})
	w.mu.Lock()
	w.informer = informer
	w.mu.Unlock()
	go func() {
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			poked() // also where there is no node
		}
	}()
	informer.RunWithContext(ctx)
}

// client waits for a kubeconfig that can be used. It is nil when the context ends.
func (w *watcher) client(ctx context.Context) rest.Interface {
	said := ""
	for {
		client, config, err := newClient(w.kubeconfig)
		if err == nil {
			w.resolve(ctx, config.Host)
			return client
		}
		if said != err.Error() {
			said = err.Error()
			w.log.Warn("node routes wait for a kubeconfig", "kubeconfig", w.kubeconfig, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(kubeconfigEvery):
		}
	}
}

// newClient knows Nodes only: a client set of all kinds would be larger than the rest of the daemon.
func newClient(kubeconfig string) (rest.Interface, *rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, nil, err
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, nil, err
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	config.GroupVersion, config.APIPath = &corev1.SchemeGroupVersion, "/api"
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	config.UserAgent = "berth/" + version.Version + " node-routes"
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	return client, config, nil
}

// resolve notes where the API server is: a route that leads its address to a node's pods would stay, since nobody would tell of
// anything else. Where a name cannot be resolved now there is no such guard.
func (w *watcher) resolve(ctx context.Context, host string) {
	if u, err := url.Parse(host); err == nil && u.Hostname() != "" {
		host = u.Hostname()
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		w.log.Debug("the API server's address is not known", "host", host, "error", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.server = nil
	for _, a := range addrs {
		w.server = append(w.server, a.Unmap())
	}
}

// servers are the API server's addresses, as far as they are known.
func (w *watcher) servers() []netip.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.server
}

// listWatch notes that the API server answers.
func (w *watcher) listWatch(client rest.Interface) cache.ListerWatcher {
	get := func(o metav1.ListOptions) *rest.Request {
		return client.Get().Resource("nodes").VersionedParams(&o, metav1.ParameterCodec)
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list := &corev1.NodeList{}
			err := get(o).Do(ctx).Into(list)
			if err == nil {
				w.answers(ctx, nil)
			}
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch = true
			events, err := get(o).Watch(ctx)
			if err == nil {
				w.answers(ctx, nil)
			}
			return events, err
		},
	}
}

// answers tells when the API server does not answer, and when it does again.
func (w *watcher) answers(ctx context.Context, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch silent := err != nil; {
	case ctx.Err() != nil || silent == w.silent:
		return
	case silent:
		w.log.Warn("Nodes cannot be watched: node routes stay as they are", "error", err)
	default:
		w.log.Info("Nodes are watched again")
	}
	w.silent = err != nil
}

// strip keeps what routes need: Node objects are large, and are kept for as long as they live.
func strip(obj any) (any, error) {
	node, ok := obj.(*corev1.Node)
	if !ok {
		return obj, nil // a tombstone
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion, CreationTimestamp: node.CreationTimestamp},
		Spec:       corev1.NodeSpec{PodCIDR: node.Spec.PodCIDR, PodCIDRs: node.Spec.PodCIDRs},
		Status:     corev1.NodeStatus{Addresses: node.Status.Addresses},
	}, nil
}

// list are the Nodes as they were last known, once they are.
func (w *watcher) list() (nodes []Node, synced bool) {
	w.mu.Lock()
	informer := w.informer
	w.mu.Unlock()
	if informer == nil || !informer.HasSynced() {
		return nil, false
	}
	for _, obj := range informer.GetStore().List() {
		if node, ok := obj.(*corev1.Node); ok {
			nodes = append(nodes, fromObject(node))
		}
	}
	return nodes, true
}

func fromObject(node *corev1.Node) Node {
	n := Node{Name: node.Name, Created: node.CreationTimestamp.Time, PodCIDRs: node.Spec.PodCIDRs}
	if len(n.PodCIDRs) == 0 && node.Spec.PodCIDR != "" {
		n.PodCIDRs = []string{node.Spec.PodCIDR}
	}
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			n.Addresses = append(n.Addresses, a.Address)
		}
	}
	return n
}
