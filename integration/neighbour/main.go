// Command neighbour feels, from a container, what others do to a node: every ten milliseconds it has a file written to the
// disk, or wants the processor back after a nap. A line each: when that began, in nanoseconds of Unix time, and how many
// nanoseconds it took, or for how many the processor was late.
//
//	neighbour fsync FILE
//	neighbour nap
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const every = 10 * time.Millisecond

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "neighbour:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	runtime.LockOSThread()
	var file *os.File
	switch {
	case len(args) == 1 && args[0] == "nap":
	case len(args) == 2 && args[0] == "fsync":
		var err error
		if file, err = os.Create(args[1]); err != nil {
			return err
		}
		defer file.Close()
	default:
		return errors.New("usage: neighbour fsync FILE | neighbour nap")
	}
	for {
		began := time.Now()
		took, err := nap()
		if err == nil && file != nil {
			began = time.Now()
			took, err = written(file)
		}
		if err == nil {
			_, err = fmt.Println(began.UnixNano(), took.Nanoseconds())
		}
		if err != nil {
			return err
		}
	}
}

// nap sleeps, and returns how much longer than it should.
func nap() (time.Duration, error) {
	began := time.Now()
	t := unix.NsecToTimespec(every.Nanoseconds())
	if err := unix.Nanosleep(&t, nil); err != nil && err != unix.EINTR {
		return 0, err
	}
	return max(time.Since(began)-every, 0), nil
}

// written writes a block and waits for it to be on the disk.
func written(f *os.File) (time.Duration, error) {
	began := time.Now()
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		return 0, err
	}
	err := f.Sync()
	return time.Since(began), err
}
