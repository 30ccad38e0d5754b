// Package streaming serves the sessions of Exec, Attach and PortForward: HTTP on the loopback interface, upgraded to SPDY
// or WebSocket. The gRPC call hands out a URL; the kubelet (or crictl) connects to it, once.
//
// It promises:
//   - SPDY (v4 to unversioned) and WebSocket (v5, v4, base64, unversioned; port-forward in SPDY inside of it, or by
//     channels), by GET and POST, as the clients of kubectl, crictl and critest speak them;
//   - a URL works once and for a minute, a thousand wait at most; everything else is 404, and nothing is ever redirected
//     (CVE-2020-8559);
//   - guessing URLs is slowed down: pods on the host network can reach the port;
//   - a client that sends no header, or a huge one, or frames, messages or streams without end, or opens connections and
//     says nothing, cannot hold the daemon's memory;
//   - when a client's connection breaks, the context of its session ends, also where nothing is read or written
//     (CVE-2022-23471), but for a command without a terminal, which goes on; Close ends all sessions;
//   - what a session says last, its exit code, reaches a client that still sends;
//   - sizes of a terminal reach only sessions that have one, and never 0.
//
// It does not decide who may run what: the kubelet does. It knows no container; whether one runs is checked before a URL
// is handed out, and again by the runtime.
//
//	srv, err := streaming.Listen(ctx, streaming.Options{Runtime: pods, Log: log})
//	defer srv.Close()
//	resp, err := srv.Exec(&cri.ExecRequest{ContainerId: id, Cmd: []string{"sh"}, Stdin: true, Stdout: true, Tty: true})
package streaming
