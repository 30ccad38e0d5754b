package program

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// Inspector compares what the kernel has with what it should have, and changes nothing. It may be used from any goroutine.
type Inspector interface {
	// Inspect looks; the error is ErrLoading until the first Sync has ended.
	Inspect(Scope) (*Inspection, error)
	// Client is which endpoint a client of a Service's port with session affinity is sent to again, and for how long still; ok
	// is false if none is remembered. The error is errors.ErrUnsupported where the kernel does not say it.
	Client(from netip.Addr, service types.NamespacedName, p *model.Port, policy model.Policy) (to netip.AddrPort, left time.Duration, ok bool, err error)
}

// ErrLoading is that the kernel is being programmed for the first time since the proxy was started: what it has is of before.
var ErrLoading = errors.New("Services are being programmed for the first time since the proxy was started")

// What can be wrong.
const (
	Missing   = "missing"
	Foreign   = "not berth's"
	Otherwise = "another value"
)

// tries is how often differences are looked at while changes are under way.
const tries = 3

// Work is locked while it changes what is wanted, and the kernel.
type Work struct {
	mu           sync.Mutex
	begun, ended atomic.Uint64
	loaded       atomic.Bool
}

// Lock begins a change.
func (w *Work) Lock() {
	w.mu.Lock()
	w.begun.Add(1)
}

// Unlock ends it.
func (w *Work) Unlock() {
	w.ended.Add(1)
	w.mu.Unlock()
}

// Loaded notes that the first Sync has ended.
func (w *Work) Loaded() { w.loaded.Store(true) }

// Settled looks until nothing differs, or nothing was changed meanwhile, some times at most. A change that is under way is waited for
// in between. Until the first Sync has ended it does not look, and its error is ErrLoading.
func (w *Work) Settled(look func() (*Inspection, error)) (found *Inspection, err error) {
	if !w.loaded.Load() {
		return nil, ErrLoading
	}
	for range tries {
		begun := w.begun.Load()
		quiet := w.ended.Load() == begun
		found, err = look()
		if err != nil || len(found.Differences) == 0 || quiet && w.begun.Load() == begun {
			break
		}
		w.mu.Lock()
		w.mu.Unlock() //nolint:staticcheck // whoever worked has ended by now
	}
	return found, err
}

// Scope is what is looked at: rules always, and elements of some Services, or of some of their ports, and of some addresses whoever's
// they are; node ports are at the unspecified address. The zero Scope is all there is.
type Scope struct {
	Services []types.NamespacedName
	// Ports are those of Services that are meant; of a Service that has none here, all are.
	Ports []Port
	At    []Place
}

// Port is a Service's port, in both families. Services may have ports of one name for several protocols.
type Port struct {
	Service  types.NamespacedName
	Name     string
	Protocol model.Protocol
}

// Has is whether a Service's port is of the Scope.
func (s *Scope) Has(p Port) bool {
	if s.All() || !slices.Contains(s.Services, p.Service) {
		return s.All()
	}
	return slices.Contains(s.Ports, p) || !slices.ContainsFunc(s.Ports, func(o Port) bool { return o.Service == p.Service })
}

// Part is what of a Service is of the Scope: nil, the Service itself, or a copy without its other ports.
func (s *Scope) Part(of *model.Service) *model.Service {
	if s.All() || of == nil {
		return of
	}
	if !slices.Contains(s.Services, of.Name) {
		return nil
	}
	part := *of
	part.Ports = slices.DeleteFunc(slices.Clone(of.Ports), func(p model.Port) bool { return !s.Has(Port{of.Name, p.Name, p.Protocol}) })
	return &part
}

// Place is an address, port and protocol.
type Place struct {
	Protocol model.Protocol
	Addr     netip.AddrPort
}

// All is whether it is all there is.
func (s *Scope) All() bool { return len(s.Services) == 0 && len(s.At) == 0 }

// Inspection is what was found.
type Inspection struct {
	// Elements is how many elements were compared, beside all rules; with iptables how many rules of Services.
	Elements int
	// Have is what the kernel has of the Scope, as nft or iptables-save would show it, with counts; not what goes for all
	// Services, and nothing for the Scope of all there is.
	Have []string
	// Differences are what is not as it should be.
	Differences []Difference
}

// Difference is something that the kernel should have otherwise.
type Difference struct {
	// Where is the table, and the set or chain of it.
	Where string `json:"where"`
	// What is wrong: missing, not berth's, another value, other rules; with iptables another share or order, too.
	What string `json:"what"`
	// Want and Have are as nft or iptables-save shows them; one of them is empty where there should be nothing, or is.
	Want string `json:"want,omitempty"`
	Have string `json:"have,omitempty"`
}

// String is a line.
func (d Difference) String() string {
	s := d.Where + ": " + d.What
	if d.Want != "" {
		s += ": should be " + d.Want
	}
	if d.Have != "" {
		s += ": is " + d.Have
	}
	return s
}
