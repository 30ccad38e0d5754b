// Package thread runs functions on operating system threads that are thrown away, so that they may move to other
// namespaces: nothing else ever runs there.
package thread

import (
	"os"
	"runtime"
	"syscall"
)

// Throwaway runs f on a thread that ends with it: no other goroutine ever runs there, and the runtime starts no thread from
// it. Goroutines that f starts do not run there. It is never the main thread, which cannot end before the process does, and
// whose namespaces are those that /proc/self shows.
func Throwaway(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if syscall.Gettid() == os.Getpid() {
			// While this goroutine holds the main thread, another one gets another thread.
			done <- Throwaway(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f() // no UnlockOSThread: the runtime ends the thread of a goroutine that ends locked to it
	}()
	return <-done
}
