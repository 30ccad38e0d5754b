// Package oom reads how many processes of a cgroup the kernel has killed because memory ran out, on cgroup v1 and v2.
//
// It is a package of its own, with almost no imports, for the shim: that decides "OOMKilled" when a container ends,
// before anyone is told of the end and before the cgroup goes away, and it must stay small.
//
// It promises a count of the kills of processes that were in this cgroup, whichever limit was hit: its own, that of the
// pod above it, or the machine's, or in one below it. The kernel counts before it kills: whoever has seen such a process
// end finds it counted.
//
//	killed, err := oom.Kills("/sys/fs/cgroup/memory/kubepods/podX/ID")
package oom
