package shim

import (
	"bytes"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxLine is the longest piece of a line in a log; a longer line becomes several, tagged P but for the last.
	// The kubelet's reader joins them.
	maxLine = 16 << 10
	// chunk is how much of a container's output is read at once.
	chunk = 64 << 10
	// flushAt is how full the formatted output gets before it is written.
	flushAt = 128 << 10
)

// Log is the log file of one container in the CRI format,
//
//	<RFC3339Nano> <stdout|stderr> <P|F> <bytes>\n
//
// (k8s.io/cri-client/pkg/logs). Both streams may be written at once; each write to the file holds whole lines. The
// bytes of a line stay as the container wrote them, carriage returns included. A full disk drops lines and counts them.
type Log struct {
	mu      sync.Mutex
	f       *os.File // nil: no log
	out     []byte
	dropped uint64
	now     func() time.Time
}

// NewLog writes to f, which was opened for appending; nil discards.
func NewLog(f *os.File) *Log { return &Log{f: f, now: time.Now} }

// Reopen goes on in f. When it returns, nothing more is written to the former file.
func (l *Log) Reopen(f *os.File) {
	l.mu.Lock()
	old := l.f
	l.f = f
	l.mu.Unlock()
	if old != nil {
		_ = old.Close()
	}
}

// Close closes the file.
func (l *Log) Close() { l.Reopen(nil) }

// Dropped returns how many bytes of output could not be written.
func (l *Log) Dropped() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// stream is one of the two streams of a log: it holds the start of a line whose end has not been read yet.
type stream struct {
	log  *Log
	name string
	tail []byte
}

func (l *Log) stream(name string) *stream { return &stream{log: l, name: name} }

// write formats what was read from the container. It never fails and never waits for anything but the file.
func (s *stream) write(p []byte) {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return
	}
	stamp := l.stamp()
	for len(p) > 0 {
		line, rest, whole := bytes.Cut(p, []byte{'\n'})
		if len(s.tail) > 0 {
			if room := maxLine - len(s.tail); len(line) > room {
				s.emit(stamp, "P", s.tail, p[:room])
				s.tail, p = s.tail[:0], p[room:]
				continue
			}
			if !whole {
				s.tail = append(s.tail, line...)
				break
			}
			s.emit(stamp, "F", s.tail, line)
			s.tail = s.tail[:0]
			if cap(s.tail) > 0 {
				s.tail = nil // an idle shim holds no buffers
			}
			p = rest
			continue
		}
		switch {
		case len(line) > maxLine:
			s.emit(stamp, "P", line[:maxLine], nil)
			p = p[maxLine:]
		case whole:
			s.emit(stamp, "F", line, nil)
			p = rest
		default:
			s.tail = append(s.tail, line...)
			p = nil
		}
	}
	l.flush()
}

// end writes the unterminated rest of the last line, as a partial one.
func (s *stream) end() {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(s.tail) > 0 && l.f != nil {
		s.emit(l.stamp(), "P", s.tail, nil)
		l.flush()
	}
	s.tail = nil
}

func (l *Log) stamp() []byte {
	return l.now().AppendFormat(make([]byte, 0, len(time.RFC3339Nano)+8), time.RFC3339Nano)
}

func (s *stream) emit(stamp []byte, tag string, a, b []byte) {
	l := s.log
	if len(l.out)+len(stamp)+len(a)+len(b)+16 > flushAt {
		l.flush()
	}
	if l.out == nil {
		l.out = getBuffer(flushAt)
	}
	l.out = append(l.out, stamp...)
	l.out = append(l.out, ' ')
	l.out = append(l.out, s.name...)
	l.out = append(l.out, ' ')
	l.out = append(l.out, tag...)
	l.out = append(l.out, ' ')
	l.out = append(l.out, a...)
	l.out = append(l.out, b...)
	l.out = append(l.out, '\n')
}

// writers bounds how many logs are written at once, since each holds a thread while the disk is slow: where the pod's
// limit of processes is used up, a shim has those that it started with (cmd/berth-shim/reserve.go).
var writers = make(chan struct{}, 3)

// flush writes what is formatted. Where the file takes only a part of it, what stands after its last whole line is cut
// off again, so that the next line does not continue a torn one.
func (l *Log) flush() {
	if len(l.out) == 0 {
		return
	}
	writers <- struct{}{}
	n, err := l.f.Write(l.out)
	<-writers
	if err != nil {
		l.dropped += uint64(len(l.out) - n)
		if whole := bytes.LastIndexByte(l.out[:n], '\n') + 1; whole < n {
			l.dropped += uint64(n - whole)
			if fi, err := l.f.Stat(); err == nil {
				_ = l.f.Truncate(fi.Size() - int64(n-whole))
			}
		}
	}
	putBuffer(l.out)
	l.out = nil
}

// Buffers are shared by all streams of a shim and given back between reads, so that a pod that says little costs little.
var buffers struct {
	mu   sync.Mutex
	free [][]byte
}

func getBuffer(size int) []byte {
	buffers.mu.Lock()
	defer buffers.mu.Unlock()
	for i, b := range buffers.free {
		if cap(b) >= size {
			buffers.free = append(buffers.free[:i], buffers.free[i+1:]...)
			return b[:0]
		}
	}
	return make([]byte, 0, size)
}

func putBuffer(b []byte) {
	buffers.mu.Lock()
	defer buffers.mu.Unlock()
	if len(buffers.free) < 4 {
		buffers.free = append(buffers.free, b[:0])
	}
}

// pump copies src, the read end of a container's pipe or its terminal, to a stream of the log and to whoever is
// attached, until the end. It holds a buffer only while there is something to read.
func pump(src *os.File, log *stream, attached *sinks) {
	defer log.end()
	raw, err := src.SyscallConn()
	if err != nil {
		return
	}
	for {
		var (
			buf  []byte
			n    int
			rerr error
		)
		err := raw.Read(func(fd uintptr) bool {
			if buf == nil {
				buf = getBuffer(chunk)[:chunk]
			}
			for {
				n, rerr = unix.Read(int(fd), buf)
				if rerr != unix.EINTR {
					break
				}
			}
			if rerr == unix.EAGAIN {
				putBuffer(buf)
				buf = nil
				return false
			}
			return true
		})
		if n > 0 && err == nil && rerr == nil {
			log.write(buf[:n])
			attached.write(buf[:n])
		}
		if buf != nil {
			putBuffer(buf)
		}
		// A terminal whose last slave is closed answers EIO: that is its end.
		if err != nil || rerr != nil || n == 0 {
			return
		}
	}
}

// sinks are the attached clients of one output stream.
type sinks struct {
	mu    sync.Mutex
	list  []*sink
	ended bool
}

// maxBehind is how far, in bytes, an attached client may be behind before it is cut off.
const maxBehind = 1 << 20

// sink writes to one attached client at the client's own pace.
type sink struct {
	f     *os.File
	mu    sync.Mutex
	cond  sync.Cond
	queue []byte
	done  bool
}

func (s *sinks) add(f *os.File) {
	k := &sink{f: f}
	k.cond.L = &k.mu
	s.mu.Lock()
	if s.ended {
		k.done = true
	} else {
		s.list = append(s.list, k)
	}
	s.mu.Unlock()
	go k.run()
	go s.watch(k)
}

// watch drops a client that has gone. Without it, one attached to a container that says nothing would stay for ever, and
// with it a descriptor for each time that somebody attaches and leaves (CVE-2022-23471).
func (s *sinks) watch(k *sink) {
	raw, err := k.f.SyscallConn()
	if err != nil {
		return
	}
	err = raw.Read(func(fd uintptr) bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, 0)
		return n > 0 // POLLERR, which needs no asking: nobody has the other end
	})
	if err != nil {
		return // closed by run, or no pipe
	}
	s.mu.Lock()
	s.list = slices.DeleteFunc(s.list, func(other *sink) bool { return other == k })
	s.mu.Unlock()
	k.mu.Lock()
	k.done, k.queue = true, nil
	k.cond.Signal()
	k.mu.Unlock()
}

func (s *sinks) write(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; i < len(s.list); i++ {
		k := s.list[i]
		k.mu.Lock()
		if len(k.queue)+len(p) > maxBehind {
			k.done, k.queue = true, nil
		}
		if !k.done {
			k.queue = append(k.queue, p...)
		}
		gone := k.done
		k.cond.Signal()
		k.mu.Unlock()
		if gone {
			s.list = append(s.list[:i], s.list[i+1:]...)
			i--
		}
	}
}

// end lets all clients have what they have not read yet, and then their end of file.
func (s *sinks) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	for _, k := range s.list {
		k.mu.Lock()
		k.done = true
		k.cond.Signal()
		k.mu.Unlock()
	}
	s.list = nil
}

func (k *sink) run() {
	defer k.f.Close()
	for {
		k.mu.Lock()
		for len(k.queue) == 0 && !k.done {
			k.cond.Wait()
		}
		p := k.queue
		k.queue = nil
		k.mu.Unlock()
		if len(p) == 0 {
			return
		}
		if _, err := k.f.Write(p); err != nil {
			k.mu.Lock()
			k.done, k.queue = true, nil
			k.mu.Unlock()
			return
		}
	}
}

// feed copies what an attached client types to the container, and calls end when the client closes its side.
func feed(dst io.Writer, src *os.File, end func()) {
	buf := make([]byte, 4<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_ = src.Close()
	end()
}
