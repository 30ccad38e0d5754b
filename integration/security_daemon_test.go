//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/internal/thread"
)

func hashFile(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

// runFor runs a program of the host, for so long at most, and returns all that it wrote.
func runFor(t *testing.T, limit time.Duration, program string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// asUser calls f on a thread that is somebody else, without a capability, and is thrown away.
func asUser(uid int, f func() error) error {
	return thread.Throwaway(func() error {
		// Each for this thread alone, unlike the functions of package syscall.
		for _, call := range []struct {
			trap uintptr
			id   int
		}{{unix.SYS_SETRESGID, uid}, {unix.SYS_SETRESUID, uid}} {
			if _, _, errno := unix.RawSyscall(call.trap, uintptr(call.id), uintptr(call.id), uintptr(call.id)); errno != 0 {
				return errno
			}
		}
		return f()
	})
}

func connectUnix(path string, kind int) error {
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// A socket that has no file is open to everybody in the network namespace, host network pods among them.
func (s *security) TestCVE_2020_15257_SocketsAreRootsAlone(t *testing.T) {
	const nobody = 1000
	plain, host := s.pod(t, plainPod), s.pod(t, hostNetworkPod)
	sockets := map[string]int{
		strings.TrimPrefix(s.Endpoint, "unix://"): unix.SOCK_STREAM,
		s.ContainerdSocket():                      unix.SOCK_STREAM, // where cAdvisor asks
		s.NRISocket():                             unix.SOCK_STREAM,
		s.AdminSocket():                           unix.SOCK_STREAM,
	}
	short, err := os.MkdirTemp("", "") // the address of a socket has 107 bytes; a link is no way around any mode
	must(t, err)
	defer os.RemoveAll(short)
	must(t, os.Chmod(short, 0o755))
	for i, p := range []*securityPod{plain, host} {
		must(t, os.Symlink(filepath.Join(s.Run(), "pods", p.id), fmt.Sprintf("%s/%d", short, i)))
		sockets[fmt.Sprintf("%s/%d/shim.sock", short, i)] = unix.SOCK_SEQPACKET
	}
	for path, kind := range sockets {
		st, err := os.Lstat(path)
		must(t, err)
		if st.Mode().Type() != os.ModeSocket || st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, st.Mode())
		}
		if err := connectUnix(path, kind); err != nil {
			t.Errorf("root: %s: %v", path, err)
		}
		if err := asUser(nobody, func() error { return connectUnix(path, kind) }); !errors.Is(err, unix.EACCES) {
			t.Errorf("uid %d: %s: %v", nobody, path, err)
		}
	}
	// Whoever reaches a shim's socket all the same, because somebody has opened its directory, is not listened to.
	dir := filepath.Join(s.Run(), "pods", plain.id)
	for path, mode := range map[string]os.FileMode{s.Run(): 0o711, filepath.Dir(dir): 0o711, dir: 0o711, filepath.Join(dir, "shim.sock"): 0o777} {
		st, err := os.Lstat(path)
		must(t, err)
		must(t, os.Chmod(path, mode))
		defer func() { must(t, os.Chmod(path, st.Mode().Perm())) }()
	}
	for uid, want := range map[int]string{0: "an answer", nobody: "nothing"} {
		got := "nothing"
		err := asUser(uid, func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: short + "/0/shim.sock"}); err != nil {
				return err
			}
			_, _ = unix.Write(fd, []byte(`{"Verb":"nonsense","ID":"x"}`)) // it may be closed already
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
			if n, _ := unix.Read(fd, make([]byte, 1<<16)); n > 0 {
				got = "an answer"
			}
			return nil
		})
		if err != nil || got != want {
			t.Errorf("uid %d gets %s of a shim, want %s (%v)", uid, got, want, err)
		}
	}
	// None of berth's is abstract, but the one that --node-routes has, which answers nobody: seen from a pod in the same network namespace.
	mine := map[string]bool{}
	for _, pid := range []int{s.Berth.PID(), s.execServer(t), s.shim(t, plain), s.shim(t, host)} {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		must(t, err)
		for _, fd := range fds {
			if target, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && strings.HasPrefix(target, "socket:[") {
				mine[strings.Trim(target, "socket:[]")] = true
			}
		}
	}
	ctr := s.container("", "cat /proc/net/unix")
	out, _, err := s.output(t, host, ctr)
	must(t, err)
	seen := 0
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 7 || !mine[f[6]] {
			continue
		}
		seen++
		if len(f) > 7 && strings.HasPrefix(f[7], "@") {
			t.Errorf("an abstract socket: %s", line)
		}
	}
	if seen == 0 {
		t.Errorf("%d sockets of berth, none of them in /proc/net/unix", len(mine))
	}
}

// Users of the host reach setuid programs of images and what containers keep secret.
func (s *security) TestCVE_2021_41103_RootsAreClosedToOthers(t *testing.T) {
	id := s.start(t, s.pod(t, plainPod), s.idle(""))
	for _, dir := range []string{s.Root(), s.Run()} {
		if err := asUser(1000, func() error { _, err := os.ReadDir(dir); return err }); !errors.Is(err, unix.EACCES) {
			t.Errorf("%s as uid 1000: %v", dir, err)
		}
	}
	for _, path := range []string{"run/containers/" + id + "/rootfs/bin/busybox", "run/containers/" + id + "/config.json", "root/images"} {
		if _, err := os.Stat(filepath.Join(s.Dir, path)); err != nil {
			t.Errorf("as root: %v", err) // else the next line shows nothing
		}
		if err := asUser(1000, func() error { _, err := os.Stat(filepath.Join(s.Dir, path)); return err }); !errors.Is(err, unix.EACCES) {
			t.Errorf("%s as uid 1000: %v", path, err)
		}
	}
	// Under any umask.
	dir := s.volume(t)
	program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.Berth.PID()))
	must(t, err)
	must(t, os.Mkdir(filepath.Join(dir, "run"), 0o777))
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "sh", "-c", `umask 0; exec "$0" serve --root "$1/root" --run "$1/run" --socket "$1/run/s.sock" --cni-conf "$1" --cni-bin "$1"`, program, dir)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	var log bytes.Buffer
	cmd.Stderr = &log
	must(t, cmd.Start())
	err = lab.Eventually(ctx, 20*time.Second, "a second daemon serves", func(context.Context) error {
		return connectUnix(dir+"/run/s.sock", unix.SOCK_STREAM)
	})
	for path, want := range map[string]os.FileMode{"root": 0o700, "run": 0o711, "run/s.sock": 0o600} {
		if st, err := os.Lstat(filepath.Join(dir, path)); err != nil || st.Mode().Perm() != want {
			t.Errorf("umask 0: %s: %v, %v", path, st, err)
		}
	}
	cancel()
	_ = cmd.Wait() // it was told to end
	if err != nil {
		t.Fatalf("%v: %s", err, log.String())
	}
}

// What execs write fills the daemon's memory.
func (s *security) TestCVE_2022_31030_ExecOutputIsBounded(t *testing.T) {
	ctr := s.idle("")
	ctr.Linux.Resources = nil // as much of the machine as it can get
	id := s.start(t, s.pod(t, plainPod), ctr)
	const parallel, each = 20, "20971520"
	before := residentKiB(t, s.Berth.PID())
	var all sync.WaitGroup
	for range parallel {
		all.Go(func() {
			resp, err := s.CRI.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
				ContainerId: id, Cmd: []string{"sh", "-c", "yes | head -c " + each + "; echo the end >&2; exit 7"}, Timeout: 120,
			})
			if err != nil || resp.ExitCode != 7 || len(resp.Stdout) == 0 || len(resp.Stdout)+len(resp.Stderr) > 16<<20 {
				t.Errorf("%v, exit code %d, %d bytes", err, resp.GetExitCode(), len(resp.GetStdout()))
			}
		})
	}
	all.Wait()
	grown := peakKiB(t, s.Berth.PID()) - before
	t.Logf("the daemon grew by %d MiB during %d execs that write %s bytes each", grown>>10, parallel, each)
	if grown > 64<<10 {
		t.Errorf("the daemon grew by %d MiB", grown>>10)
	}
}

// stream opens a WebSocket session at a URL of the streaming server, as kubectl did, and returns its connection.
func (s *security) stream(t *testing.T, address string, header http.Header) net.Conn {
	t.Helper()
	u, err := url.Parse(address)
	must(t, err)
	conn, err := net.Dial("tcp", u.Host)
	must(t, err)
	must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
	must(t, err)
	req.Header = header
	must(t, req.Write(conn))
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, req)
	must(t, err)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%s: %s", address, resp.Status)
	}
	return conn
}

func webSocketHeader() http.Header {
	return http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-WebSocket-Version": {"13"},
		"Sec-WebSocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}, "Sec-WebSocket-Protocol": {"v4.channel.k8s.io"},
	}
}

// Clients that vanish leave goroutines, descriptors and processes behind.
func (s *security) TestCVE_2022_23471_VanishedClientsLeaveNothing(t *testing.T) {
	p := s.pod(t, plainPod)
	ctr := s.container("", "trap 'exit 0' TERM; while :; do sleep 1; echo tick; done")
	ctr.Stdin = true
	id := s.start(t, p, ctr)
	tty := s.idle("")
	tty.Tty, tty.Stdin = true, true
	terminal := s.start(t, p, tty)
	count := func() map[string]int {
		files := map[string]int{}
		for name, pid := range map[string]int{"daemon": s.Berth.PID(), "exec server": s.execServer(t), "shim": s.shim(t, p)} {
			files[name] = len(s.descriptors(t, pid))
		}
		pids := 0
		for _, e := range processes(t) {
			if e.cmdline == "sh -c exec sleep 77777" || e.cmdline == "sleep 77777" {
				pids++
			}
		}
		files["processes"] = pids
		return files
	}
	round := func(n int) {
		for range n {
			ex, err := s.CRI.RuntimeServiceClient.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"sleep", "77777"}, Tty: true, Stdin: true, Stdout: true})
			must(t, err)
			at, err := s.CRI.Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true})
			must(t, err)
			att, err := s.CRI.Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: terminal, Stdin: true, Stdout: true, Tty: true})
			must(t, err)
			for _, address := range []string{ex.Url, at.Url, att.Url} {
				conn := s.stream(t, address, webSocketHeader())
				if tcp, ok := conn.(*net.TCPConn); ok {
					_ = tcp.SetLinger(0) // a reset, as when the client's machine is gone
				}
				_ = conn.Close()
			}
		}
	}
	round(3) // what the first sessions need for good
	time.Sleep(2 * time.Second)
	before := count()
	before["processes"] = 0
	round(40)
	err := lab.Eventually(t.Context(), 30*time.Second, "everything is closed", func(context.Context) error {
		after := count()
		for name, n := range after {
			if n > before[name]+2 { // Go keeps a descriptor more or less
				return fmt.Errorf("before: %v, now: %v", before, after)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if _, code := s.exec(t, id, "true"); code != 0 {
		t.Errorf("an exec afterwards: exit code %d", code)
	}
}

// One SPDY frame says that four thousand million headers follow.
func (s *security) TestCVE_2026_35469_HugeSPDYHeader(t *testing.T) {
	id := s.start(t, s.pod(t, plainPod), s.idle(""))
	before := residentKiB(t, s.Berth.PID())
	for range 5 {
		ex, err := s.CRI.RuntimeServiceClient.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
		must(t, err)
		conn := s.stream(t, ex.Url, http.Header{"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {"v4.channel.k8s.io"}})
		var block bytes.Buffer
		z := zlib.NewWriter(&block)
		_ = binary.Write(z, binary.BigEndian, uint32(1<<32-1))
		_, _ = z.Write(bytes.Repeat([]byte{0, 0, 0, 1, 'x', 0, 0, 0, 1, 'y'}, 1000))
		must(t, z.Flush())
		var frame bytes.Buffer // SYN_STREAM of SPDY/3.1, stream 1
		for _, v := range []any{uint16(0x8003), uint16(1), uint32(10 + block.Len()), uint32(1), uint32(0), uint16(0)} {
			must(t, binary.Write(&frame, binary.BigEndian, v))
		}
		frame.Write(block.Bytes())
		_, err = conn.Write(frame.Bytes())
		must(t, err)
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection stays open")
		}
		_ = conn.Close()
	}
	if grown := peakKiB(t, s.Berth.PID()) - before; grown > 16<<10 {
		t.Errorf("the daemon grew by %d KiB", grown)
	}
}

// A token that works twice, for something else, or a redirect that takes the client elsewhere.
func (s *security) TestCVE_2020_8559_TokensAndRedirects(t *testing.T) {
	id := s.start(t, s.pod(t, plainPod), s.idle(""))
	address := func() string {
		ex, err := s.CRI.RuntimeServiceClient.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true, Stderr: true})
		must(t, err)
		return ex.Url
	}
	client := http.Client{Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	get := func(address string, header http.Header) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
		must(t, err)
		req.Header = header
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	used := address()
	u, err := url.Parse(used)
	must(t, err)
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() {
		t.Errorf("the streaming server is at %s", u.Host)
	}
	_ = s.stream(t, used, webSocketHeader()).Close()
	for name, address := range map[string]string{
		"used again": used, "of exec on attach": strings.Replace(address(), "/exec/", "/attach/", 1), "of exec on portforward": strings.Replace(address(), "/exec/", "/portforward/", 1),
		"unclean path": strings.Replace(address(), "/exec/", "//exec/", 1), "dots": strings.Replace(address(), "/exec/", "/x/../exec/", 1), "with a slash": address() + "/",
		"no token": strings.TrimSuffix(address(), "x")[:strings.LastIndex(used, "/")+1], "guessed": used[:len(used)-1] + "_", "root": "http://" + u.Host + "/",
		// CVE-2019-11248: profiles, and whatever else a default mux has.
		"pprof": "http://" + u.Host + "/debug/pprof/", "pprof heap": "http://" + u.Host + "/debug/pprof/heap", "vars": "http://" + u.Host + "/debug/vars", "metrics": "http://" + u.Host + "/metrics",
	} {
		if code := get(address, webSocketHeader()); code != http.StatusNotFound {
			t.Errorf("%s: %d", name, code)
		}
	}
	for range 300 {
		if code := get(fmt.Sprintf("http://%s/exec/%08x", u.Host, time.Now().UnixNano()&0xffffffff), webSocketHeader()); code != http.StatusNotFound {
			t.Fatalf("a guess: %d", code)
		}
	}
	// Nothing but the streaming server is reachable over the network, in no namespace.
	for _, pid := range []int{s.Berth.PID(), s.execServer(t), s.shim(t, s.pod(t, plainPod))} {
		for _, l := range listeners(t, pid) {
			if pid != s.Berth.PID() || l != u.Port() {
				t.Errorf("process %d listens on port %s", pid, l)
			}
		}
	}
}

// listeners are the ports on which a process takes TCP connections.
func listeners(t *testing.T, pid int) []string {
	t.Helper()
	own := map[string]bool{}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	must(t, err)
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil {
			own[target] = true
		}
	}
	var ports []string
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" || !own["socket:["+f[9]+"]"] {
				continue
			}
			var port int
			_, err := fmt.Sscanf(f[1][strings.LastIndexByte(f[1], ':')+1:], "%X", &port)
			must(t, err)
			ports = append(ports, fmt.Sprint(port))
		}
	}
	return ports
}

// The daemon follows what somebody with access to the log directory has put in the place of a log.
func (s *security) TestCVE_2026_95839_LogPaths(t *testing.T) {
	p := s.ownPod(t, s.podConfig(plainPod))
	dir := p.cfg.LogDirectory
	target := s.sentinel.Dir + "/etc/passwd"
	for name, path := range map[string]string{"up": "../x.log", "up inside": "a/../../x.log", "absolute": target, "newline": "a\nb.log", "only up": ".."} {
		ctr := s.container("", "echo written")
		ctr.LogPath = path
		if _, err := s.tryStart(t, p, ctr); codeOf(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "log_path") {
			t.Errorf("%s: %v", name, err)
		}
	}
	attacks := map[string]func(path string) error{
		"link":           func(path string) error { return os.Symlink(target, path) },
		"link up":        func(path string) error { return os.Symlink(up+target, path) },
		"link to a new":  func(path string) error { return os.Symlink(s.sentinel.Dir+"/new", path) },
		"link to a link": func(path string) error { return os.Symlink(s.sentinel.Dir+"/link", path) },
		"link inside":    func(path string) error { return os.Symlink("other.log", path) },
		"magic link":     func(path string) error { return os.Symlink("/proc/self/fd/2", path) },
		"fifo":           func(path string) error { return unix.Mkfifo(path, 0o666) },
		"directory":      func(path string) error { return os.Mkdir(path, 0o755) },
		"device":         func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) },
	}
	for name, attack := range attacks {
		for _, sub := range []string{"", "sub/"} {
			ctr := s.container("", "echo written")
			ctr.LogPath = sub + ctr.LogPath
			must(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
			must(t, attack(filepath.Join(dir, ctr.LogPath)))
			start := time.Now()
			if _, err := s.tryStart(t, p, ctr); err == nil {
				t.Errorf("%s%s: runs", sub, name)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("%s%s: refused after %v", sub, name, took)
			}
			s.sentinel.Check(t)
		}
	}
	// A directory on the way.
	must(t, os.Symlink(s.sentinel.Dir+"/dir", filepath.Join(dir, "way")))
	ctr := s.container("", "echo written")
	ctr.LogPath = "way/x.log"
	if _, err := s.tryStart(t, p, ctr); err == nil {
		t.Error("a link on the way: runs")
	}
	// All of it again when the log is opened anew, with the container running on.
	ctr = s.container("", "trap 'exit 0' TERM; while :; do echo tick; sleep 0.2; done")
	ctr.LogPath = "c/0.log"
	id := s.start(t, p, ctr)
	path := filepath.Join(dir, ctr.LogPath)
	reopen := func() error {
		_, err := s.CRI.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
		return err
	}
	for name, attack := range attacks {
		must(t, os.Rename(path, path+".1"))
		must(t, attack(path))
		if err := reopen(); err == nil {
			t.Errorf("%s at reopening: no error", name)
		}
		must(t, os.RemoveAll(path))
		must(t, os.Rename(path+".1", path))
	}
	for name, swap := range map[string]string{"its directory": filepath.Join(dir, "c"), "the pod's directory": dir} {
		must(t, os.Rename(swap, swap+".old"))
		must(t, os.Symlink(s.sentinel.Dir+"/dir", swap))
		if err := reopen(); err == nil {
			t.Errorf("%s swapped for a link: no error", name)
		}
		must(t, os.Remove(swap))
		must(t, os.Rename(swap+".old", swap))
	}
	s.sentinel.Check(t)
	must(t, os.Rename(path, path+".1"))
	must(t, reopen())
	must(t, lab.Eventually(t.Context(), 10*time.Second, "the log goes on", func(context.Context) error {
		if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), "tick") {
			return fmt.Errorf("%q, %w", text, err)
		}
		return nil
	}))
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode of the log: %v (%v)", st, err)
	}
}

// A process of the host loads a library, or runs a program, of the container that it works on.
func (s *security) TestCVE_2019_14271_NothingOfAContainerIsLoaded(t *testing.T) {
	p := s.pod(t, plainPod)
	image := s.image(t, nil,
		imagestest.File("etc/nsswitch.conf", "passwd: evil\ngroup: evil\nhosts: evil\n"), imagestest.File("lib/libnss_evil.so.2", "x").Mode(0o755),
		imagestest.File("etc/ld.so.preload", "/lib/libnss_evil.so.2\n"), imagestest.File("bin/unpigz", "#!/bin/sh\ntouch /ran\n").Mode(0o755))
	ctr := s.idle(image)
	ctr.Envs = []*runtimeapi.KeyValue{{Key: "LD_PRELOAD", Value: []byte("./evil.so")}, {Key: "LD_LIBRARY_PATH", Value: []byte("/lib")}}
	id := s.start(t, p, ctr)
	s.exec(t, id, "id")
	for name, pid := range map[string]int{"daemon": s.Berth.PID(), "exec server": s.execServer(t), "shim": s.shim(t, p)} {
		f, err := elf.Open(fmt.Sprintf("/proc/%d/exe", pid))
		must(t, err)
		for _, segment := range f.Progs {
			if segment.Type == elf.PT_INTERP || segment.Type == elf.PT_DYNAMIC {
				t.Errorf("%s is not a static program: it has %v", name, segment.Type)
			}
		}
		_ = f.Close()
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		must(t, err)
		for line := range strings.Lines(string(maps)) {
			if file := strings.Fields(line); len(file) > 5 && (strings.Contains(file[5], s.Dir+"/run/") || strings.Contains(file[5], ".so")) {
				t.Errorf("%s maps %s", name, line)
			}
		}
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		must(t, err)
		if strings.Contains(string(env), "LD_PRELOAD") {
			t.Errorf("%s has the container's environment", name)
		}
	}
}

// Entries of a layer that lead out of it; containers of the images that are left run and touch nothing outside.
func (s *security) TestCVE_2021_32760_HostileLayers(t *testing.T) {
	p := s.pod(t, plainPod)
	ran := 0
	for _, c := range imagestest.Corpus(s.sentinel.Dir) {
		if len(c.Tar) == 0 {
			continue
		}
		ref := s.push(imagestest.NewImage(s.busybox, imagestest.GzipLayer(c.Tar)))
		_, err := s.CRI.Pull(t.Context(), ref)
		s.sentinel.Check(t)
		if (err != nil) != c.Refused {
			t.Errorf("%s: %v", c.Name, err)
		}
		if err != nil {
			continue
		}
		id, err := s.CRI.Start(t.Context(), p.id, p.cfg, s.container(ref, "echo x > /etc/made; echo x > /made"))
		if err == nil {
			_, err = s.CRI.WaitExit(t.Context(), id, 30*time.Second)
			ran++
		}
		if err != nil {
			t.Logf("%s does not run: %v", c.Name, err)
		}
		if id != "" {
			s.remove(t, id)
		}
		s.removeImage(t, ref)
		s.sentinel.Check(t)
		s.noMountOutside(t)
	}
	if ran < 20 {
		t.Errorf("containers of %d images ran", ran)
	}
}

// A read that is aborted leaves whoever waits for the layer waiting.
func (s *security) TestCVE_2021_20291_TruncatedPulls(t *testing.T) {
	img := imagestest.NewImage(imagestest.Layer(imagestest.File("x", strings.Repeat("content ", 100<<10))), imagestest.PlainLayer(imagestest.Tar(imagestest.File("y", strings.Repeat("y", 1<<20)))))
	ref := s.push(img)
	s.reg.Hook(func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.Contains(req.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", "1000000")
		_, _ = w.Write([]byte("short"))
		return true
	})
	defer s.reg.Hook(nil)
	pull := func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.CRI.Pull(ctx, ref); err == nil || ctx.Err() != nil {
			t.Fatalf("a truncated pull: %v", err)
		}
	}
	pull()
	files, threads := len(s.descriptors(t, s.Berth.PID())), readStatus(t, s.Berth.PID())["Threads"]
	for range 40 {
		pull()
	}
	must(t, lab.Eventually(t.Context(), 10*time.Second, "everything is closed", func(context.Context) error {
		if now := len(s.descriptors(t, s.Berth.PID())); now > files+2 {
			return fmt.Errorf("%d descriptors, %d before", now, files)
		}
		return nil
	}))
	t.Logf("threads: %s before, %s after", threads, readStatus(t, s.Berth.PID())["Threads"])
	s.reg.Hook(nil)
	_, err := s.CRI.Pull(t.Context(), ref)
	must(t, err)
	s.removeImage(t, ref)
}
