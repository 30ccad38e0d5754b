// Package socket makes unix sockets that belong to root alone, in places where others may have left one.
//
// It promises:
//   - a socket that somebody listens on is left alone, and so is a file that is no socket;
//   - one that nobody listens on any more, as a killed daemon leaves it, is replaced;
//   - nobody but root can connect, or put a socket of their own in the place of ours (CVE-2020-15257);
//   - what is taken away is ours: another program may have put its socket in the place meanwhile;
//   - of a name that one process of a network namespace is to have ([Only]), nothing is left when that has ended.
//
// It does not ask whoever connects who they are: the mode of the file does.
//
//	l, err := socket.Listen(ctx, "/run/berth/berth.sock")
//	if errors.Is(err, socket.ErrInUse) {
//		…
//	}
package socket
