// Package explain says what becomes of packets to an address of a Service on this node, and why: which Service it is, which
// endpoints get which share and why the others get none, what is rejected or dropped, whose source is replaced, and whether the
// kernel has what it should have.
//
//	s := &explain.Server{Model: m, Look: &look, Inspector: p.Inspector(), ...}
//	answer, err := s.Answer(explain.Question{Target: "10.96.0.10:53/udp", From: "10.244.1.7"})
//	answer.Text(os.Stdout)
//
// It is served on a unix socket that root alone may connect to (Serve), and asked by Ask. It changes nothing, neither in the model
// nor in the kernel, and no change of a Service waits for more of it than to look the Service up.
package explain
