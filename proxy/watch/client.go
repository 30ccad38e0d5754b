package watch

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/berth-run/berth/internal/version"
)

// ClientOptions say how to reach the API server.
type ClientOptions struct {
	// Kubeconfig is a file; without it and Master the pod's own service account is used.
	Kubeconfig string
	// Master, if it is not empty, is the API server instead of the kubeconfig's.
	Master string
	// ContentType and AcceptContentTypes are how objects are sent; protobuf if they are empty.
	ContentType, AcceptContentTypes string
	// QPS and Burst bound the requests a second; client-go's bounds if they are 0, none if they are negative.
	QPS   float32
	Burst int
}

// Client reaches the four groups of the API server that a proxy needs. A client set of all groups would be larger than the rest
// of the program.
type Client struct {
	core, discovery, networking, events rest.Interface
}

// NewClient reads the kubeconfig. It does not connect yet.
func NewClient(o ClientOptions) (*Client, error) {
	config, err := restConfig(o)
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme, eventsv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.UserAgent = "berth/" + version.Version + " proxy"
	// One connection for all groups.
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("client of the API server: %w", err)
	}
	c := &Client{}
	for client, group := range map[*rest.Interface]schema.GroupVersion{
		&c.core: corev1.SchemeGroupVersion, &c.discovery: discoveryv1.SchemeGroupVersion,
		&c.networking: networkingv1.SchemeGroupVersion, &c.events: eventsv1.SchemeGroupVersion,
	} {
		if *client, err = groupClient(*config, group, transport); err != nil {
			return nil, fmt.Errorf("client of the API server: %w", err)
		}
	}
	return c, nil
}

func groupClient(config rest.Config, group schema.GroupVersion, transport *http.Client) (rest.Interface, error) {
	config.GroupVersion, config.APIPath = &group, "/apis"
	if group.Group == "" {
		config.APIPath = "/api"
	}
	return rest.RESTClientForConfigAndClient(&config, transport)
}

func restConfig(o ClientOptions) (*rest.Config, error) {
	var config *rest.Config
	var err error
	if o.Kubeconfig == "" && o.Master == "" {
		if config, err = rest.InClusterConfig(); errors.Is(err, rest.ErrNotInCluster) {
			err = errors.New("there is no kubeconfig, and this is no pod with a service account: give clientConnection.kubeconfig, or --kubeconfig")
		}
	} else {
		config, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
			&clientcmd.ClientConfigLoadingRules{ExplicitPath: o.Kubeconfig},
			&clientcmd.ConfigOverrides{ClusterInfo: clientcmdapi.Cluster{Server: o.Master}}).ClientConfig()
		if err != nil && o.Kubeconfig != "" {
			err = fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
		}
	}
	if err != nil {
		return nil, err
	}
	config.ContentType, config.AcceptContentTypes = o.ContentType, o.AcceptContentTypes
	if config.ContentType == "" {
		config.ContentType = runtime.ContentTypeProtobuf
	}
	config.QPS, config.Burst = o.QPS, o.Burst
	return config, nil
}

// CreateEvent has an Event written down.
func (c *Client) CreateEvent(ctx context.Context, e *eventsv1.Event) error {
	return c.events.Post().Namespace(e.Namespace).Resource("events").
		VersionedParams(&metav1.CreateOptions{}, metav1.ParameterCodec).Body(e).Do(ctx).Error()
}

// RenewEvent has an Event that is there be seen once more, now. The API server keeps it for another hour then (--event-ttl).
func (c *Client) RenewEvent(ctx context.Context, e *eventsv1.Event) error {
	patch := func(body string) (*eventsv1.Event, error) {
		is := &eventsv1.Event{}
		err := c.events.Patch(types.MergePatchType).Namespace(e.Namespace).Resource("events").Name(e.Name).
			VersionedParams(&metav1.PatchOptions{}, metav1.ParameterCodec).Body([]byte(body)).Do(ctx).Into(is)
		return is, err
	}
	is, err := patch("{}") // reads it, which would take another right
	if err != nil {
		return err
	}
	seen := int32(1)
	if is.Series != nil {
		seen = is.Series.Count
	}
	_, err = patch(fmt.Sprintf(`{"series":{"count":%d,"lastObservedTime":%q}}`, max(seen, 1)+1, e.EventTime.UTC().Format(metav1.RFC3339Micro)))
	return err
}
