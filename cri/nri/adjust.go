package nri

import (
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-run/berth/cri/spec"
)

// CDIInjector adds devices of the Container Device Interface, by their qualified names, to a specification.
type CDIInjector func(s *specs.Spec, names []string) error

// Adjust makes what plugins want of a specification, whose process and Linux parts must be there. What cannot be taken as
// it is follows the node: without a swap controller no swap limit is set.
func (r *Runtime) Adjust(s *specs.Spec, a *api.ContainerAdjustment, swapController bool) error {
	return r.guard("adjust", func() error { return adjust(s, a, r.o.InjectCDI, swapController) })
}

func adjust(s *specs.Spec, a *api.ContainerAdjustment, cdi CDIInjector, swapController bool) error {
	if a == nil {
		return nil
	}
	g := newGenerator(s)
	options := []generate.GeneratorOption{
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) {
			return &specs.LinuxIntelRdt{ClosID: class}, nil
		}),
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) {
			return nil, fmt.Errorf("class %q: this runtime has no classes of block I/O", class)
		}),
		generate.WithCDIDeviceInjector(func(s *specs.Spec, names []string) error {
			if cdi == nil {
				return errors.New("this runtime has no CDI")
			}
			return cdi(s, names)
		}),
	}
	if err := generate.SpecGenerator(g, options...).Adjust(a); err != nil {
		return err
	}
	memory := s.Linux.Resources.Memory
	want := a.GetLinux().GetResources().GetMemory()
	if v := want.GetReservation().Get(); v != nil {
		memory.Reservation = v // the library leaves these three out
	}
	if v := want.GetSwap().Get(); v != nil {
		memory.Swap = v
	}
	if v := want.GetSwappiness().Get(); v != nil {
		memory.Swappiness = v
	}
	if !swapController {
		memory.Swap = nil
	}
	if adj := a.GetLinux().GetSeccompPolicy(); adj != nil && s.Linux.Seccomp != nil {
		if errno := adj.GetDefaultErrno(); errno != nil {
			v := uint(errno.GetValue())
			s.Linux.Seccomp.DefaultErrnoRet = &v
		}
	}
	s.Process.Rlimits = lastOfEach(s.Process.Rlimits)
	spec.BoundHooks(s.Hooks)
	g.prune()
	return nil
}

// lastOfEach keeps the last limit of each type: the library appends its own to what is there.
func lastOfEach(list []specs.POSIXRlimit) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	for _, l := range list {
		out = slices.DeleteFunc(out, func(o specs.POSIXRlimit) bool { return o.Type == l.Type })
		out = append(out, l)
	}
	return out
}
