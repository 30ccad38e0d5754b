// Package host checks, before a daemon starts, that this host and this process can run it: kernel, privileges, roots,
// shim, and that no other daemon has the same roots. Each problem is one line that says what to do about it.
//
//	if err := host.Check(); err != nil { … }
//	lock, err := host.Claim("/var/lib/berth", "/run/berth")
//	defer lock.Release()
package host
