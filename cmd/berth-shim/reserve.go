package main

import (
	"sync"

	"golang.org/x/sys/unix"
)

// reservedThreads is how many threads a shim has from the start. It counts towards its pod's limit of processes, which a
// container may use up, and Go ends a program for which it cannot start a thread. A thread that waits in the kernel (for
// the disk of a log) needs another to go on with the rest; what more than these wait at once goes on one after the other.
const reservedThreads = 6

// reserveThreads has Go start the threads, which it keeps once they are idle.
func reserveThreads() {
	var gate [2]int
	if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
		return
	}
	var blocked, done sync.WaitGroup
	blocked.Add(reservedThreads)
	for range reservedThreads {
		done.Go(func() {
			blocked.Done()
			var b [1]byte
			_, _ = unix.Read(gate[0], b[:]) // holds its thread, unlike a read through the poller
		})
	}
	blocked.Wait()
	_ = unix.Close(gate[1])
	done.Wait()
	_ = unix.Close(gate[0])
}
