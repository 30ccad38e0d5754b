package cgroups

import (
	"bytes"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

// reader reads files of the kernel into one buffer, and keeps the first error.
type reader struct {
	buf []byte
	err error
}

func newReader() *reader { return &reader{buf: make([]byte, 0, 8192)} }

// number reads a file of one number, where "max" is Unlimited.
func (r *reader) number(dir, file string) uint64 {
	data := bytes.TrimSpace(r.read(dir, file))
	switch {
	case len(data) == 0:
		return 0
	case string(data) == "max":
		return Unlimited
	}
	v, err := strconv.ParseUint(string(data), 10, 64)
	if err != nil {
		r.fail(dir, file, err)
	}
	return v
}

// keyed reads a file of lines "key number".
func (r *reader) keyed(dir, file string, each func(key string, v uint64)) {
	r.lines(dir, file, func(line []byte) error {
		key, value, ok := bytes.Cut(line, []byte(" "))
		if !ok {
			return nil
		}
		v, err := strconv.ParseUint(string(value), 10, 64)
		if err == nil {
			each(string(key), v)
		}
		return err
	})
}

// lines reads a file line by line, up to one that each refuses.
func (r *reader) lines(dir, file string, each func(line []byte) error) {
	data := r.read(dir, file)
	for len(data) > 0 {
		var line []byte
		line, data, _ = bytes.Cut(data, []byte("\n"))
		if err := each(line); err != nil {
			r.fail(dir, file, err)
			return
		}
	}
}

// read returns nothing, without an error, for the file of a controller that is not there.
func (r *reader) read(dir, file string) []byte {
	if r.err != nil || dir == "" {
		return nil
	}
	data, err := r.readAll(dir + "/" + file)
	if err == nil {
		return data
	}
	switch {
	case err == unix.EOPNOTSUPP: // pressure, where it is turned off
	case !gone(err) || !exists(dir):
		r.fail(dir, file, err)
	}
	return nil
}

// readAll makes plain system calls: the runtime's poller is of no use for files of the kernel and costs four more calls.
func (r *reader) readAll(name string) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	buf := r.buf[:0]
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, cap(buf))...)[:len(buf)]
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n == 0:
			r.buf = buf
			return buf, nil
		}
		buf = buf[:len(buf)+n]
	}
}

func (r *reader) fail(dir, file string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("%s/%s: %w", dir, file, err)
	}
}
