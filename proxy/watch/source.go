package watch

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/berth-run/berth/proxy/model"
)

// Kind is a kind of objects that is watched.
type Kind uint8

// The kinds.
const (
	Service Kind = iota
	EndpointSlice
	ServiceCIDR
	Node
	kinds
)

func (k Kind) String() string {
	return [...]string{"Service", "EndpointSlice", "ServiceCIDR", "Node"}[k]
}

// source is how a kind is watched.
type source struct {
	client   rest.Interface
	resource string
	object   runtime.Object
	list     func() runtime.Object
	// labels and fields select, as kube-proxy does (cmd/kube-proxy/app/server.go). What a server hands over although it is not
	// selected, the model leaves out by the same labels.
	labels, fields string
	// optional is a kind that an older API server may not have.
	optional bool
}

func sources(c *Client, node string) [kinds]source {
	return [kinds]source{
		Service: {
			client: c.core, resource: "services", object: &corev1.Service{}, list: func() runtime.Object { return &corev1.ServiceList{} },
			labels: "!" + model.ServiceProxyNameLabel, fields: fields.OneTermNotEqualSelector("spec.clusterIP", corev1.ClusterIPNone).String(),
		},
		EndpointSlice: {
			client: c.discovery, resource: "endpointslices", object: &discoveryv1.EndpointSlice{}, list: func() runtime.Object { return &discoveryv1.EndpointSliceList{} },
			labels: "!" + model.HeadlessLabel,
		},
		ServiceCIDR: {
			client: c.networking, resource: "servicecidrs", object: &networkingv1.ServiceCIDR{}, list: func() runtime.Object { return &networkingv1.ServiceCIDRList{} },
			optional: true,
		},
		Node: {
			client: c.core, resource: "nodes", object: &corev1.Node{}, list: func() runtime.Object { return &corev1.NodeList{} },
			fields: fields.OneTermEqualSelector(metav1.ObjectNameField, node).String(),
		},
	}
}

// trim takes from an object what the model does not read. A list of all of them is in memory for a moment at the start.
func trim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Service:
		annotations := keep(o.Annotations, func(name string) bool { return strings.HasPrefix(name, model.AnnotationPrefix) })
		o.ObjectMeta = meta(&o.ObjectMeta)
		o.Annotations = annotations
		o.Spec.Selector = nil
		o.Status.Conditions = nil
	case *discoveryv1.EndpointSlice:
		annotations := keep(o.Annotations, func(name string) bool {
			return name == corev1.EndpointsLastChangeTriggerTime || name == model.WeightAnnotation
		})
		o.ObjectMeta = meta(&o.ObjectMeta)
		o.Annotations = annotations
		for i := range o.Endpoints {
			e := &o.Endpoints[i]
			e.Hostname, e.DeprecatedTopology = nil, nil
			if e.TargetRef != nil {
				*e.TargetRef = corev1.ObjectReference{Kind: e.TargetRef.Kind, Name: e.TargetRef.Name}
			}
		}
	case *networkingv1.ServiceCIDR:
		o.ObjectMeta = meta(&o.ObjectMeta)
	case *corev1.Node:
		o.ObjectMeta = meta(&o.ObjectMeta)
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses}
	}
	return obj, nil
}

// keep is those annotations that are read; nil without any.
func keep(annotations map[string]string, read func(name string) bool) map[string]string {
	var kept map[string]string
	for name, text := range annotations {
		if read(name) {
			if kept == nil {
				kept = map[string]string{}
			}
			kept[name] = text
		}
	}
	return kept
}

// meta keeps what the model, the health checks and this package read.
func meta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp, Labels: m.Labels,
	}
}

// known is whether it is an object of a kind that was asked for; cache.DeletedFinalStateUnknown and the like are none.
func known(kind Kind, obj any) (metav1.Object, bool) {
	if tomb, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = tomb.Obj
	}
	var ok bool
	switch kind {
	case Service:
		_, ok = obj.(*corev1.Service)
	case EndpointSlice:
		_, ok = obj.(*discoveryv1.EndpointSlice)
	case ServiceCIDR:
		_, ok = obj.(*networkingv1.ServiceCIDR)
	case Node:
		_, ok = obj.(*corev1.Node)
	}
	if !ok {
		return nil, false
	}
	o, ok := obj.(metav1.Object)
	return o, ok && o.GetName() != ""
}
