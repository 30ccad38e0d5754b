// Package streaming serves the sessions of Exec, Attach and PortForward: HTTP on the loopback interface, upgraded to SPDY
// or WebSocket by k8s.io/cri-streaming. The gRPC call hands out a URL; the kubelet (or crictl) connects to it, once.
//
// It promises, beyond what the library does:
//   - a URL works once and for a minute; everything else is 404, and nothing is ever redirected (CVE-2020-8559);
//   - guessing URLs is slowed down: pods on the host network can reach the port;
//   - a client that sends no header, or a huge one, or opens connections without end, cannot hold the daemon's memory;
//   - when a client's connection breaks, the context of its session ends, also where nothing is read or written
//     (CVE-2022-23471), but for a command without a terminal, which goes on; Close ends all sessions;
//   - sizes of a terminal reach only sessions that have one, and never 0.
//
// It does not decide who may run what: the kubelet does. It knows no container; whether one runs is checked before a URL
// is handed out, and again by the runtime.
//
// The kubelet speaks SPDY with us, whatever its clients speak with it. WebSocket is for crictl and critest
// (v5.channel.k8s.io, and port-forwards as SPDY in binary messages), which the library does not know and which is served
// here, and for clients of v4.channel.k8s.io and older.
//
//	srv, err := streaming.Listen(ctx, streaming.Options{Runtime: pods, Log: log})
//	defer srv.Close()
//	resp, err := srv.Exec(&cri.ExecRequest{ContainerId: id, Cmd: []string{"sh"}, Stdin: true, Stdout: true, Tty: true})
package streaming
