// Package cgroups creates, limits, measures, kills and removes the cgroups of pods and containers, on cgroup v1, hybrid
// and v2, with the drivers cgroupfs and systemd ([Driver]).
//
// It promises:
//   - a [Path] is absolute, clean and never the root of a hierarchy, so that nothing runs outside every limit
//     (CVE-2025-47291), and [Verify] says whether a process is where it belongs;
//   - [Update] keeps what it is not told to change, and puts back what it had changed when the kernel refuses a part;
//   - [ReadStats] costs a handful of file reads and asks no process;
//   - [Kill] signals no process outside the cgroup, even when process ids are reused under it, and returns when the
//     cgroup is empty;
//   - [Remove], [Kill] and [Processes] treat a cgroup that is not there as an empty one.
//
// It does not promise device rules (libcontainer sets them when it creates the container), nor that a parent which
// [CreateSandbox] made on the way goes away again: the kubelet owns parents.
//
//	p, err := driver.Join(cfg.GetLinux().GetCgroupParent(), id)
//	if err == nil {
//		err = cgroups.CreateSandbox(p)
//	}
//	if err == nil {
//		err = cgroups.AddProcess(p, shim.Pid)
//	}
package cgroups
