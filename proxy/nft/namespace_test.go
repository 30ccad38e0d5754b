package nft

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// space is a network namespace of a test.
type space struct {
	t    testing.TB
	name string
	ns   *os.File
}

// newSpace makes a network namespace, which ends with the test.
func newSpace(t testing.TB, name string) *space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	s := &space{t: t, name: name}
	err := thread.Throwaway(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		s.ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ns.Close() })
	return s
}

// do runs f in the namespace.
func (s *space) do(f func() error) error {
	return thread.Throwaway(func() error {
		if err := unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// run runs a program in the namespace; try may fail, and input has something to read for it.
func (s *space) run(name string, args ...string) string {
	s.t.Helper()
	out, err := s.try(name, args...)
	if err != nil {
		s.t.Fatalf("%s: %s %s: %v\n%s", s.name, name, strings.Join(args, " "), err, out)
	}
	return out
}

func (s *space) try(name string, args ...string) (string, error) {
	return s.input("", name, args...)
}

func (s *space) input(in, name string, args ...string) (string, error) {
	var out []byte
	err := s.do(func() (err error) {
		c := exec.Command(name, args...)
		c.Stdin = strings.NewReader(in)
		out, err = c.CombinedOutput()
		return err
	})
	return string(out), err
}

// program opens a Programmer in the namespace.
func (s *space) program(o Options) *Programmer {
	s.t.Helper()
	var p *Programmer
	if err := s.do(func() (err error) { p, err = Open(o); return err }); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { p.Close() })
	return p
}
