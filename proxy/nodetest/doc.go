// Package nodetest is for tests of what programs a kernel: a node with pods, and a client outside, each in a network namespace of
// its own, which ask each other who answers, and States to be programmed there.
//
//	l := nodetest.New(t, 2)            // a node with two pods
//	l.Node.Do(func() error { ... })   // in the node's namespace
//	l.Want(l.Client, "tcp4", "10.96.0.1:80", nodetest.Refused)
//
// It promises that all of it ends with the test. It does not program anything.
package nodetest
