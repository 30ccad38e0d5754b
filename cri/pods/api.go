package pods

import (
	"io"
	"net/netip"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
)

// Sandbox is what is known of a pod sandbox at one instant. Nobody changes it once it is handed out.
type Sandbox struct {
	ID        string // 64 hexadecimal digits
	Config    *cri.PodSandboxConfig
	Handler   string // runtime handler as requested
	Ready     bool
	CreatedAt time.Time
	IPs       []netip.Addr // IPv4 first; none on the host network
	NetNS     string       // path of the pinned network namespace, "" on the host network
	ShimPID   int
	// CgroupPath is the shim's. Those of the containers are beside it, in the pod's.
	CgroupPath cgroups.Path
	// Overhead and Resources are those of the pod as a whole, as the last resize told them.
	Overhead, Resources *cri.LinuxContainerResources
	// Reason says why the sandbox is not ready, where it is known: "stopped", "the node was restarted", …
	Reason string
	// Waiting says what of the sandbox could not be released yet; nil where all is.
	Waiting *Waiting
}

// Waiting is what keeps a sandbox that is not ready from being released.
type Waiting struct {
	For   string    `json:"for"` // the error
	Since time.Time `json:"since"`
	Tries int       `json:"tries"`
	Next  time.Time `json:"next"`
}

// Container is what is known of a container at one instant. Nobody changes it once it is handed out.
type Container struct {
	ID, SandboxID string // 64 hexadecimal digits each
	Config        *cri.ContainerConfig
	ImageID       string // digest of the image's configuration
	ImageRef      string // a repository digest of the image, or its id where it has none
	State         cri.ContainerState
	CreatedAt     time.Time
	StartedAt     time.Time // zero until started
	FinishedAt    time.Time // zero until exited
	ExitCode      int32
	Reason        string // "Completed", "Error", "OOMKilled", "StartError", "ShimDied", …
	Message       string
	LogPath       string // absolute, "" where no log was asked for
	PID           int    // in the host's PID namespace; 0 unless created or running
	User          *cri.ContainerUser
	StopSignal    string // such as "SIGTERM"
	Resources     *cri.LinuxContainerResources
	CgroupPath    cgroups.Path
}

// Streams are the ends of an exec or attach session. A nil stream was not asked for.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	Resize         <-chan TerminalSize
}

// TerminalSize is the size of a terminal in characters.
type TerminalSize struct{ Width, Height uint16 }
