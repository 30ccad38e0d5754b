package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client speaks the CRI to a runtime: both its services, and what tests do over and over.
type Client struct {
	runtimeapi.RuntimeServiceClient
	runtimeapi.ImageServiceClient

	conn *grpc.ClientConn
}

// Dial connects to a CRI endpoint. The connection is made again by itself after the runtime was restarted.
func Dial(endpoint string) (*Client, error) {
	// The kubelet waits up to three seconds between two tries; a test that restarts the runtime hundreds of times does not.
	retry := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.2, MaxDelay: 200 * time.Millisecond},
		MinConnectTimeout: time.Second,
	}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(retry), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", endpoint, err)
	}
	return &Client{runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn), conn}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Ready is nil when the runtime says that it and its network are ready.
func (c *Client) Ready(ctx context.Context) error {
	resp, err := c.RuntimeServiceClient.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}
	for _, cond := range resp.GetStatus().GetConditions() {
		// What other conditions a runtime has (containerd: that nothing in use is deprecated) the kubelet does not look at.
		if !cond.Status && (cond.Type == runtimeapi.RuntimeReady || cond.Type == runtimeapi.NetworkReady) {
			return fmt.Errorf("%s is false: %s: %s", cond.Type, cond.Reason, cond.Message)
		}
	}
	return nil
}

// Answers is nil when the runtime answers, whatever it says.
func (c *Client) Answers(ctx context.Context) error {
	_, err := c.RuntimeServiceClient.Status(ctx, &runtimeapi.StatusRequest{})
	return err
}

// Pull pulls an image and returns its reference.
func (c *Client) Pull(ctx context.Context, image string) (string, error) {
	resp, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", image, err)
	}
	return resp.ImageRef, nil
}

// RunPod starts a pod sandbox.
func (c *Client) RunPod(ctx context.Context, pod *runtimeapi.PodSandboxConfig) (string, error) {
	resp, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return "", fmt.Errorf("run pod %s: %w", pod.GetMetadata().GetName(), err)
	}
	return resp.PodSandboxId, nil
}

// Create creates a container in a pod; the image is pulled if it is not there.
func (c *Client) Create(ctx context.Context, podID string, pod *runtimeapi.PodSandboxConfig, ctr *runtimeapi.ContainerConfig) (string, error) {
	status, err := c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: ctr.Image})
	if err != nil {
		return "", fmt.Errorf("image %s: %w", ctr.Image.GetImage(), err)
	}
	if status.Image == nil {
		if _, err := c.Pull(ctx, ctr.Image.GetImage()); err != nil {
			return "", err
		}
	}
	resp, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: ctr, SandboxConfig: pod})
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", ctr.GetMetadata().GetName(), err)
	}
	return resp.ContainerId, nil
}

// Start creates a container in a pod and starts it.
func (c *Client) Start(ctx context.Context, podID string, pod *runtimeapi.PodSandboxConfig, ctr *runtimeapi.ContainerConfig) (string, error) {
	id, err := c.Create(ctx, podID, pod, ctr)
	if err != nil {
		return "", err
	}
	if _, err := c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return id, fmt.Errorf("start container %s: %w", ctr.GetMetadata().GetName(), err)
	}
	return id, nil
}

// ContainerState is the status of a container.
func (c *Client) ContainerState(ctx context.Context, id string) (*runtimeapi.ContainerStatus, error) {
	resp, err := c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return nil, fmt.Errorf("status of container %.12s: %w", id, err)
	}
	return resp.Status, nil
}

// WaitExit waits until a container has exited, and returns its status.
func (c *Client) WaitExit(ctx context.Context, id string, within time.Duration) (*runtimeapi.ContainerStatus, error) {
	var status *runtimeapi.ContainerStatus
	err := Eventually(ctx, within, fmt.Sprintf("exit of container %.12s", id), func(ctx context.Context) error {
		var err error
		if status, err = c.ContainerState(ctx, id); err != nil {
			return err
		}
		if status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", status.State)
		}
		return nil
	})
	return status, err
}

// Exec runs a command in a container and returns its standard output; an exit code other than 0 is an error with what it
// wrote to standard error.
func (c *Client) Exec(ctx context.Context, id string, cmd ...string) (string, error) {
	resp, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: int64(30 * patience())})
	if err != nil {
		return "", fmt.Errorf("exec %q in %.12s: %w", cmd, id, err)
	}
	if resp.ExitCode != 0 {
		return string(resp.Stdout), fmt.Errorf("exec %q in %.12s: exit code %d: %s", cmd, id, resp.ExitCode, resp.Stderr)
	}
	return string(resp.Stdout), nil
}

// PodIP is the first address of a pod.
func (c *Client) PodIP(ctx context.Context, podID string) (string, error) {
	resp, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID})
	if err != nil {
		return "", fmt.Errorf("status of pod %.12s: %w", podID, err)
	}
	return resp.GetStatus().GetNetwork().GetIp(), nil
}

// RemovePod stops and removes a pod with all its containers.
func (c *Client) RemovePod(ctx context.Context, podID string) error {
	if _, err := c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID}); err != nil {
		return fmt.Errorf("stop pod %.12s: %w", podID, err)
	}
	if _, err := c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: podID}); err != nil {
		return fmt.Errorf("remove pod %.12s: %w", podID, err)
	}
	return nil
}

// RemovePods removes every pod that the predicate picks.
func (c *Client) RemovePods(ctx context.Context, pick func(*runtimeapi.PodSandbox) bool) error {
	resp, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var errs []error
	for _, pod := range resp.Items {
		if pick(pod) {
			errs = append(errs, c.RemovePod(ctx, pod.Id))
		}
	}
	return errors.Join(errs...)
}

// owns tells whether a pod belongs to the node: all do, unless another runtime is shared with others.
func (n *Node) owns(pod *runtimeapi.PodSandbox) bool {
	if !n.shared {
		return true
	}
	return strings.HasPrefix(pod.GetMetadata().GetNamespace(), n.Network()) || strings.HasSuffix(pod.GetMetadata().GetName(), "-"+n.Network())
}

// random is a name part that no other pod has.
func random() string {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}
