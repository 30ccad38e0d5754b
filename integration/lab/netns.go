package lab

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
)

// StartIn starts a program in a network namespace, "" for this process's own, with its output in the file log.
func StartIn(netns, name, log string, env []string, program string, args ...string) (*Process, error) {
	if netns == "" {
		return start(name, log, env, program, args...)
	}
	p, err := prepare(name, log, env, program, args...)
	if err != nil {
		return nil, err
	}
	return p.startElsewhere(func() error { return enterNet(netns) })
}

func enterNet(netns string) error {
	ns, err := os.Open(netns)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
}

// Forward is a listener inside a network namespace whose connections lead to the same address in this process's: nodes in
// namespaces of their own reach an API server on this machine's loopback by it.
type Forward struct {
	listener net.Listener
	mu       sync.Mutex
	open     map[net.Conn]bool
	closed   bool
	copies   sync.WaitGroup
}

// NewForward listens at an address, HOST:PORT, in a network namespace.
func NewForward(netns, address string) (*Forward, error) {
	f := &Forward{open: map[net.Conn]bool{}}
	err := network.InNamespaces([]string{netns}, func() (err error) {
		f.listener, err = net.Listen("tcp", address) // a socket stays in the namespace that it was made in
		return err
	})
	if err != nil {
		return nil, err
	}
	f.copies.Go(func() {
		for {
			in, err := f.listener.Accept()
			if err != nil {
				return
			}
			f.copies.Go(func() { f.serve(in, address) })
		}
	})
	return f, nil
}

func (f *Forward) serve(in net.Conn, address string) {
	out, err := net.Dial("tcp", address)
	if err != nil {
		_ = in.Close() // nobody listens: the other side sees a connection that ends
		return
	}
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		_, _ = in.Close(), out.Close()
		return
	}
	f.open[in], f.open[out] = true, true
	f.mu.Unlock()
	both := sync.WaitGroup{}
	for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1])
			_, _ = way[0].Close(), way[1].Close()
		})
	}
	both.Wait()
	f.mu.Lock()
	delete(f.open, in)
	delete(f.open, out)
	f.mu.Unlock()
}

// Close ends the listener and all connections.
func (f *Forward) Close() error {
	err := f.listener.Close()
	f.mu.Lock()
	f.closed = true
	for c := range f.open {
		err = errors.Join(err, ignoreClosed(c.Close()))
	}
	f.mu.Unlock()
	f.copies.Wait()
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
