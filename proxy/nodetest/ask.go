package nodetest

import (
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// PortAtEnd is what ServeTCPOnce says.
func (l *Lab) PortAtEnd(c net.Conn) int {
	l.T.Helper()
	if err := c.SetDeadline(time.Now().Add(Patience)); err != nil {
		l.T.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		l.T.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		l.T.Fatal(err)
	}
	return n
}

// What Ask says if nobody answers.
const (
	Refused = "refused"
	Silence = "silence"
	Denied  = "denied" // a datagram of the node itself, rejected or dropped
)

// Patience is how long an answer is waited for that should come, Quiet how long one that should not.
const (
	Patience = 10 * time.Second
	Quiet    = 700 * time.Millisecond
)

// Ask connects and says who answers, and whom that takes for the client.
func (s *Space) Ask(network, to string) string { return s.AskFor(Patience, network, to) }

// AskFor is Ask with a bound on the time of each step.
func (s *Space) AskFor(d time.Duration, network, to string) string {
	start := time.Now()
	c, err := s.DialFor(d, network, to)
	if err != nil {
		return Wrong(err)
	}
	defer c.Close()
	if took := time.Since(start); took > 900*time.Millisecond {
		s.T.Logf("%s to %s %s: connected after %s", s.Name, network, to, took) // a SYN was lost, or the machine is busy
	}
	return AgainFor(d, c)
}

// Dial connects from the namespace.
func (s *Space) Dial(network, to string) (c net.Conn, err error) {
	return s.DialFor(Patience, network, to)
}

// DialFor is Dial with a bound on the time.
func (s *Space) DialFor(d time.Duration, network, to string) (c net.Conn, err error) {
	err = s.Do(func() (err error) { c, err = net.DialTimeout(network, to, d); return err })
	return c, err
}

// Again asks on a connection that is there.
func Again(c net.Conn) string { return AgainFor(Patience, c) }

// AgainFor is Again with a bound on the time.
func AgainFor(d time.Duration, c net.Conn) string {
	if err := c.SetDeadline(time.Now().Add(d)); err != nil {
		return err.Error()
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return Wrong(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		return Wrong(err)
	}
	return strings.TrimSpace(string(b[:n]))
}

// Wrong says in a word why nobody has answered.
func Wrong(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return Refused
	case errors.Is(err, unix.EPERM):
		return Denied
	case errors.As(err, &timeout) && timeout.Timeout():
		return Silence
	}
	return err.Error()
}

// Want asks, and fails the test if the answer is another one.
func (l *Lab) Want(from *Space, network, to, answer string) {
	l.T.Helper()
	d := Patience
	if answer == Silence {
		d = Quiet
	}
	got := from.AskFor(d, network, to)
	if got == Denied && from == l.Node && (answer == Silence || answer == Refused) && strings.HasPrefix(network, "udp") {
		return
	}
	if got != answer {
		l.T.Errorf("%s to %s %s: %q, want %q", from.Name, network, to, got, answer)
	}
}

// Spread asks so many times and counts who answers.
func (l *Lab) Spread(from *Space, network, to string, times int) map[string]int {
	got := map[string]int{}
	for range times {
		got[strings.Fields(from.Ask(network, to) + " ")[0]]++
	}
	return got
}

// Connections are some that are open to a Service.
func (l *Lab) Connections(from *Space, network, to string, n int) (all []net.Conn) {
	l.T.Helper()
	for range n {
		c, err := from.Dial(network, to)
		if err != nil {
			l.T.Fatal(err)
		}
		l.T.Cleanup(func() { c.Close() })
		all = append(all, c)
	}
	return all
}

// Alive fails the test if one of connections is broken.
func (l *Lab) Alive(all []net.Conn) {
	l.T.Helper()
	for i, c := range all {
		if a := Again(c); !strings.HasPrefix(a, "pod") {
			l.T.Errorf("connection %d: %q", i, a)
		}
	}
}
