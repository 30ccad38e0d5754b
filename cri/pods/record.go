package pods

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/spec"
)

// phase is how far a pod or a container is on its way.
type phase string

const (
	creating phase = "creating" // the call that makes it has not returned
	ready    phase = "ready"    // pod: usable; container: created
	starting phase = "starting" // container: StartContainer is under way or done
	stopped  phase = "stopped"  // pod: not ready; container: exited
	removing phase = "removing"
)

// podRecord is what is kept of a pod, in ROOT/pods/ID.json.
type podRecord struct {
	format

	ID        string
	Boot      string // boot id of the kernel it was made under
	Phase     phase
	Steps     []string // begun and not undone
	Handler   string   `json:",omitempty"`
	CreatedAt time.Time
	Cgroup    string
	IPs       []netip.Addr `json:",omitempty"`
	NetID     string       `json:",omitempty"` // of its network namespace: what is pinned at the path may be another
	Conflist  []byte       `json:",omitempty"` // the network configuration that its addresses come from
	ShimPID   int          `json:",omitempty"`
	Lean      bool         `json:",omitempty"` // its shim is in a lean mount namespace
	PausePID  int          `json:",omitempty"`
	Reason    string       `json:",omitempty"`
	SELinux   spec.Labels  `json:",omitzero"`

	Config message[*cri.PodSandboxConfig]
	// Overhead and Resources are what a resize has made of those in Config.
	Overhead  message[*cri.LinuxContainerResources] `json:",omitzero"`
	Resources message[*cri.LinuxContainerResources] `json:",omitzero"`
}

// containerRecord is what is kept of a container, in ROOT/containers/ID.json.
type containerRecord struct {
	format

	ID         string
	SandboxID  string
	Boot       string
	Phase      phase
	Steps      []string
	CreatedAt  time.Time
	StartedAt  time.Time `json:",omitzero"`
	FinishedAt time.Time `json:",omitzero"`
	ExitCode   int32     `json:",omitempty"`
	Reason     string    `json:",omitempty"`
	Message    string    `json:",omitempty"`
	ImageID    string
	ImageRef   string
	Cgroup     string
	StopSignal int
	StopName   string
	Signalled  bool   `json:",omitempty"` // the stop signal was sent
	LogPath    string `json:",omitempty"`
	PID        int    `json:",omitempty"`

	Config    message[*cri.ContainerConfig]
	User      message[*cri.ContainerUser]
	Resources message[*cri.LinuxContainerResources]
	// Resizing are the resources of an update that is under way; a daemon that finds some finishes it.
	Resizing message[*cri.LinuxContainerResources] `json:",omitzero"`
}

// message is a protocol buffer in a JSON record, readable by people. It is never changed, but replaced.
type message[M proto.Message] struct {
	M     M
	later json.RawMessage // all of it, where it has fields of a later release
}

// MarshalJSON implements json.Marshaler.
func (m message[M]) MarshalJSON() ([]byte, error) {
	if m.later != nil {
		return m.later, nil
	}
	if !m.M.ProtoReflect().IsValid() {
		return []byte("null"), nil
	}
	return protojson.MarshalOptions{UseProtoNames: true}.Marshal(m.M)
}

// UnmarshalJSON implements json.Unmarshaler. Fields of a later release are passed over, and kept.
func (m *message[M]) UnmarshalJSON(data []byte) error {
	if string(data) == "null" {
		return nil
	}
	var zero M
	m.M = zero.ProtoReflect().New().Interface().(M)
	if protojson.Unmarshal(data, m.M) == nil {
		return nil
	}
	m.later = bytes.Clone(data)
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, m.M)
}

// records is a directory of records: one file each, and a spare beside it, .ID, with which it changes places when it is
// written, so that each is whole at any instant and no write makes or frees an inode: ext4 without a journal takes half a
// millisecond for a new one. What a spare has is never read. Nothing is synced: no pod survives a power cut, so that the worst that
// can be is an empty newest record of something that is gone. What outlives one, its network, is noted apart, and synced
// (network/intent.go).
type records struct{ dir string }

var idPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

func openRecords(dir string) (*records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &records{dir}, nil
}

func (r *records) path(id string) string { return filepath.Join(r.dir, id+".json") }

func (r *records) spare(id string) string { return filepath.Join(r.dir, "."+id) }

func (r *records) save(id string, rec record) error {
	data, err := encode(rec)
	if err != nil {
		return fmt.Errorf("record %s: %w", id, err)
	}
	if err := overwrite(r.spare(id), data); err != nil {
		return err
	}
	err = unix.Renameat2(unix.AT_FDCWD, r.spare(id), unix.AT_FDCWD, r.path(id), unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // the first; or a file system that exchanges no names
		return os.Rename(r.spare(id), r.path(id))
	}
	if err != nil {
		return &os.LinkError{Op: "exchange", Old: r.spare(id), New: r.path(id), Err: err}
	}
	return nil
}

// overwrite makes data what a file has, which is made where there is none. Unlike os.WriteFile it does not give up the file's
// blocks first.
func overwrite(path string, data []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Truncate(int64(len(data)))
}

func (r *records) remove(id string) error {
	err := os.Remove(r.path(id))
	spare := os.Remove(r.spare(id))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if errors.Is(spare, os.ErrNotExist) {
		spare = nil
	}
	return errors.Join(err, spare)
}

// load calls each with every record's id and content. Files that are torn or no records are set aside with a warning,
// so that they are looked at once, and their ids returned.
func (r *records) load(log *slog.Logger, each func(id string, data []byte) error) (damaged []string, err error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") {
			_ = os.Remove(filepath.Join(r.dir, name)) // a spare, or a write that a crash cut off
			continue
		}
		id, ok := strings.CutSuffix(name, ".json")
		if !ok || !idPattern.MatchString(id) {
			continue
		}
		data, err := os.ReadFile(r.path(id))
		if err != nil {
			return nil, err
		}
		err = each(id, data)
		if errors.Is(err, errLaterVersion) {
			return nil, err
		}
		if err != nil {
			log.Warn("record is damaged and set aside: what it named is lost to berth", "file", r.path(id), "error", err)
			if err := os.Rename(r.path(id), r.path(id)+".damaged"); err != nil {
				return nil, err
			}
			damaged = append(damaged, id)
		}
	}
	return damaged, nil
}

func decodePod(id string, data []byte) (*podRecord, error) {
	var r podRecord
	if err := decode(data, &r, &r.format); err != nil {
		return nil, fmt.Errorf("pod %s: %w", id, err)
	}
	if r.ID != id || r.Config.M == nil || r.Config.M.Metadata == nil {
		return nil, errors.New("record is not of this pod or has no configuration")
	}
	return &r, nil
}

func decodeContainer(id string, data []byte) (*containerRecord, error) {
	var r containerRecord
	if err := decode(data, &r, &r.format); err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	if r.ID != id || !idPattern.MatchString(r.SandboxID) || r.Config.M == nil || r.Config.M.Metadata == nil {
		return nil, errors.New("record is not of this container or has no configuration")
	}
	return &r, nil
}
