// Package admin is the way into a running daemon for an operator's tools: HTTP over a unix socket, JSON, and lines of JSON
// for what takes long. The server's and the client's side are here together, so that both mean the same messages.
//
// It promises:
//   - only the user that the daemon runs as gets an answer, whatever the mode of the socket (SO_PEERCRED);
//   - lists come from memory and wait for no pull;
//   - a client that goes takes its call with it: a pull that nobody else waits for ends, an import leaves nothing;
//   - the daemon opens no path that a client names: archives travel through the socket;
//   - credentials come in a body, not in a path, and are in no log.
//
// It does not know the CRI, and it is no stable interface: a tool is of the version of its daemon.
//
// Example:
//
//	c := admin.NewClient("/run/berth/admin/admin.sock")
//	imgs, err := c.Images(ctx)
package admin
