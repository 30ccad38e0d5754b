// Package network gives pods their network through CNI, and makes and pins their namespaces.
//
// [Manager] runs the plugins of the configuration that the node has. It promises:
//   - the first configuration in lexical order is used; one that appears, changes or vanishes later, and a plugin that is
//     installed later, is seen within seconds and without a restart, also when the directories were made anew; until then
//     [Manager.Ready] says what is missing;
//   - without a configuration the network is made of the node's pod CIDRs, as soon as they are known ([Manager.SetPodCIDRs]),
//     unless the node has had one that may come back;
//   - [Manager.Teardown] works where it matters: after a crash in [Manager.Setup], after a reboot (the namespace is gone),
//     with a torn result cache, and with no configuration on the node any more, from the bytes that the caller kept;
//   - what a pod is about to be added to is on the disk before the first plugin runs, and [Manager.GC] has DEL run from it where
//     a power cut has left nothing else;
//   - plugins of the reference project are answered in process (package [cni]), unless their programs on the node are others
//     or the options want these run; all others are run;
//   - a plugin's program that runs when the daemon is killed finishes, and the next daemon waits for it before it undoes its
//     work; one that is answered in process ends with it, and its DEL undoes all that it may have done;
//   - a plugin that hangs ends with the caller's context, with all processes of its group; one that says too much is
//     stopped; its type is a name, never a path (CVE-2021-20206);
//   - errors name pod, network and plugin, or file and line of a configuration. Classes: errdefs.ErrUnavailable where the
//     node is not ready for the pod (yet), errdefs.ErrInvalidArgument where the request is wrong.
//
// [Pin] makes network, IPC and UTS namespaces without starting a process and without leaving a thread in them, and keeps
// them by bind mounts. A pin that exists is whole: hostname, loopback and sysctls are set before. [Unpin] releases the
// namespaces in every mount namespace that had come to hold a copy of the pin.
//
// It does not serialise calls for one pod (the caller holds a lock for each), does not retry, but for teardowns that it is
// handed ([Manager.Owe]), and does not watch the network of a pod that runs.
//
//	m, err := network.Open(network.Options{ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin"}, CacheDir: dir})
//	...
//	err = network.Pin(network.NamespaceSet{Net: net, IPC: ipc, UTS: uts, Hostname: "web-0"})
//	pod.Conflist, err = m.Conflist() // kept in the pod's record before the plugins run
//	res, err := m.Setup(ctx, pod)
//	...
//	err = m.Teardown(ctx, pod)
//	err = network.Unpin(net, ipc, uts)
package network
