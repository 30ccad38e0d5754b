package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// podsPath is where the pods of these tests are: in the one namespace that an API server makes for its users.
const podsPath = "/api/v1/namespaces/default/pods"

// errNotFound is the answer for an object that the API server does not know.
var errNotFound = errors.New("not found")

// Do sends a request to the API server and returns the body of its answer.
func (cp *ControlPlane) Do(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, cp.url(path), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+cp.token)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := cp.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	switch {
	case err != nil:
		return nil, err
	case resp.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%s %s: %w: %s", method, path, errNotFound, bytes.TrimSpace(answer))
	case resp.StatusCode >= 300:
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(answer))
	}
	return answer, nil
}

// Get asks the API server.
func (cp *ControlPlane) Get(ctx context.Context, path string) ([]byte, error) {
	return cp.Do(ctx, http.MethodGet, path, "", nil)
}

// Create makes an object of a YAML manifest; path is that of its kind.
func (cp *ControlPlane) Create(ctx context.Context, path, manifest string) error {
	_, err := cp.Do(ctx, http.MethodPost, path, "application/yaml", []byte(manifest))
	return err
}

// CreatePod makes a pod of a YAML manifest.
func (cp *ControlPlane) CreatePod(ctx context.Context, manifest string) error {
	return cp.Create(ctx, podsPath, manifest)
}

// PatchPod merges a JSON or YAML patch into a pod, or into a subresource of it ("resize").
func (cp *ControlPlane) PatchPod(ctx context.Context, name, subresource, patch string) error {
	path := podsPath + "/" + name
	if subresource != "" {
		path += "/" + subresource
	}
	_, err := cp.Do(ctx, http.MethodPatch, path, "application/strategic-merge-patch+json", []byte(patch))
	return err
}

// Pod is what the API server has of a pod, thus what the kubelet has told it.
func (cp *ControlPlane) Pod(ctx context.Context, name string) (*Pod, error) {
	body, err := cp.Get(ctx, podsPath+"/"+name)
	if err != nil {
		return nil, err
	}
	var pod Pod
	if err := json.Unmarshal(body, &pod); err != nil {
		return nil, fmt.Errorf("pod %s: %w", name, err)
	}
	return &pod, nil
}

// WaitPod waits until a pod is as the predicate wants it: nil for yes, otherwise what is missing.
func (cp *ControlPlane) WaitPod(ctx context.Context, name string, within time.Duration, want func(*Pod) error) (*Pod, error) {
	var pod *Pod
	err := Eventually(ctx, within, "pod "+name, func(ctx context.Context) error {
		var err error
		if pod, err = cp.Pod(ctx, name); err != nil {
			return err
		}
		if err := want(pod); err != nil {
			return fmt.Errorf("%w (%s)", err, pod)
		}
		return nil
	})
	if err != nil {
		return pod, fmt.Errorf("%w\nits events:\n%s", err, cp.Events(ctx, name))
	}
	return pod, nil
}

// DeletePod deletes a pod with its own grace period, and waits until the kubelet has let it go.
func (cp *ControlPlane) DeletePod(ctx context.Context, name string, within time.Duration) error {
	if _, err := cp.Do(ctx, http.MethodDelete, podsPath+"/"+name, "", nil); err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	return Eventually(ctx, within, "deletion of pod "+name, func(ctx context.Context) error {
		pod, err := cp.Pod(ctx, name)
		switch {
		case errors.Is(err, errNotFound):
			return nil
		case err != nil:
			return err
		}
		return fmt.Errorf("it is still there (%s)", pod)
	})
}

// Events are the events of a pod, a line each: what `kubectl describe` shows.
func (cp *ControlPlane) Events(ctx context.Context, pod string) string {
	body, err := cp.Get(ctx, "/api/v1/namespaces/default/events?fieldSelector=involvedObject.name="+pod)
	if err != nil {
		return err.Error()
	}
	var list struct {
		Items []struct{ Type, Reason, Message string }
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return err.Error()
	}
	var lines []string
	for _, e := range list.Items {
		lines = append(lines, fmt.Sprintf("%s %s: %s", e.Type, e.Reason, e.Message))
	}
	return strings.Join(lines, "\n")
}

// WaitNode waits until a node is ready, as its kubelet says.
func (cp *ControlPlane) WaitNode(ctx context.Context, name string, within time.Duration) error {
	return Eventually(ctx, within, "node "+name, func(ctx context.Context) error {
		body, err := cp.Get(ctx, "/api/v1/nodes/"+name)
		if err != nil {
			return err
		}
		var node struct {
			Status struct {
				Conditions []struct{ Type, Status, Reason, Message string }
			}
		}
		if err := json.Unmarshal(body, &node); err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == "Ready" && c.Status == "True" {
				return nil
			}
		}
		return fmt.Errorf("it is not ready: %+v", node.Status.Conditions)
	})
}

// Kubectl runs kubectl and returns its standard output.
func (cp *ControlPlane) Kubectl(ctx context.Context, args ...string) (string, error) {
	return runCommand(cp.KubectlCommand(ctx, args...))
}

// KubectlCommand is the command that Kubectl runs, for tests that need its standard input or environment. Its home is the
// control plane's, so that it reads no configuration but that.
func (cp *ControlPlane) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, cp.tools.Kubectl, append([]string{"--kubeconfig", cp.Kubeconfig}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+cp.Dir, "KUBECACHEDIR="+filepath.Join(cp.Dir, "kubectl"))
	return cmd
}

// runCommand runs a command and returns its standard output; its standard error is in the error.
func runCommand(cmd *exec.Cmd) (string, error) {
	var out, errs bytes.Buffer
	cmd.Stdout = &out
	if cmd.Stderr == nil {
		cmd.Stderr = &errs
	}
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, errs.String())
	}
	return out.String(), nil
}
