// Package spec decides what a container is: it computes an OCI runtime specification from the CRI request, the image's
// configuration and facts of the host, and says which requests are not acceptable.
//
// It promises:
//   - no I/O: every function is a function of its arguments. Files of the image, symbolic links, propagation of mounts,
//     device nodes and profiles are read by the caller and handed in as facts ([Input], [Host]);
//   - nothing that an image or an annotation says becomes configuration, except the fields of the image configuration
//     that the OCI image specification defines (entrypoint, command, environment, user, working directory, stop signal);
//   - the result shares no memory with its input, so that containers of one image cannot see each other's values;
//   - errors name the field and the value, and wrap a class of github.com/containerd/errdefs: ErrInvalidArgument for a
//     request that can never work, ErrFailedPrecondition for one that this host or pod cannot satisfy,
//     ErrNotImplemented for what berth does not offer yet.
//
// It does not promise that the container starts: the kernel and libcontainer have the last word. Checks that need the
// file system (mounts over /proc, a working directory behind a symbolic link) are libcontainer's.
//
//	if err := spec.ValidateContainer(sandbox, config); err != nil {
//		return err
//	}
//	out, err := spec.Container(spec.Input{
//		ID: id, Sandbox: sandbox, Container: config, Image: image.Config, Host: host,
//		Namespaces: spec.Namespaces{Net: netPath, IPC: ipcPath, UTS: utsPath},
//		RootfsPath: rootfs, CgroupPath: cgroup, PodFiles: files, Passwd: passwd, Group: group, Sources: sources,
//	})
package spec
