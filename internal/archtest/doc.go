// Package archtest holds the import rules of this repository (docs/architecture.md) by a test; it has no code of its own.
//
// It promises that a package which reaches where it must not makes the test fail, with the chain of imports that leads
// there. It does not judge test files: a test may arrange what its package may not know.
package archtest
