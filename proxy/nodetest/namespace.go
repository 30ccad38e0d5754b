package nodetest

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// Space is a network namespace of a test.
type Space struct {
	T    testing.TB
	Name string
	NS   *os.File
}

// NewSpace makes a network namespace, which ends with the test.
func NewSpace(t testing.TB, name string) *Space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	s := &Space{T: t, Name: name}
	err := thread.Throwaway(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		s.NS, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.NS.Close() })
	return s
}

// Do runs f in the namespace.
func (s *Space) Do(f func() error) error {
	return thread.Throwaway(func() error {
		if err := unix.Setns(int(s.NS.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// Run runs a program in the namespace, and fails the test if that fails.
func (s *Space) Run(name string, args ...string) string {
	s.T.Helper()
	out, err := s.Try(name, args...)
	if err != nil {
		s.T.Fatalf("%s: %s %s: %v\n%s", s.Name, name, strings.Join(args, " "), err, out)
	}
	return out
}

// Try runs a program that may fail.
func (s *Space) Try(name string, args ...string) (string, error) {
	return s.Input("", name, args...)
}

// Input is Try with something to read for the program.
func (s *Space) Input(in, name string, args ...string) (string, error) {
	var out []byte
	err := s.Do(func() (err error) {
		c := exec.Command(name, args...)
		c.Stdin = strings.NewReader(in)
		out, err = c.CombinedOutput()
		return err
	})
	return string(out), err
}
