// Package cdi resolves the names of CDI devices ("vendor.com/class=name") and applies what their vendors say of them to a
// container's OCI specification: environment, device nodes, mounts, hooks, groups. The format is that of the Container
// Device Interface (https://github.com/cncf-tags/container-device-interface), read by its own library.
//
// It promises that a directory of specifications cannot hold up or exhaust the daemon: only regular files of at most 1 MiB
// are opened, a thousand of each directory, and that a hook ends. The directories are the administrator's, so that their
// contents are trusted to name any file, device and program of the host; they are read anew for each container that asks
// for a device, so that nothing is watched or cached.
//
//	edits, err := cdi.Registry{Dirs: []string{"/etc/cdi", "/var/run/cdi"}}.Resolve([]string{"vendor.com/gpu=0"})
//	if err == nil {
//		err = edits.Apply(spec)
//	}
//
// Annotations are not read: the kubelet names devices in a field of its own (ContainerConfig.CDI_devices).
package cdi
