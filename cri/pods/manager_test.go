package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/network"
)

func bare(t *testing.T) *Manager {
	t.Helper()
	files, err := openRecords(filepath.Join(t.TempDir(), "containers"))
	if err != nil {
		t.Fatal(err)
	}
	return &Manager{
		ctrFiles: files, opts: Options{Run: t.TempDir(), Network: &network.Manager{}}, events: newEvents(time.Now),
		pods: map[string]*pod{}, containers: map[string]*container{}, making: map[string]*container{}, names: map[string]*claim{},
	}
}

func TestFindTakesUniquePrefixes(t *testing.T) {
	all := map[string]int{podA: 1, podB: 2, ctrA: 3}
	for _, tc := range []struct {
		id   string
		want int
		err  error
	}{
		{podA, 1, nil},
		{podB, 2, nil},
		{"cc", 3, nil},
		{ctrA[:13], 3, nil},
		{"aa", 0, errdefs.ErrInvalidArgument},
		{"", 0, errdefs.ErrNotFound},
		{"dd", 0, errdefs.ErrNotFound},
		{podA + "0", 0, errdefs.ErrNotFound},
		{"../" + podA, 0, errdefs.ErrNotFound},
	} {
		got, err := find(all, "pod", tc.id)
		if got != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("find %q: %d, %v; want %d, %v", tc.id, got, err, tc.want, tc.err)
		}
	}
}

// pains.md: a cancelled call leaves its name reserved, and every retry fails.
func TestNameIsFreeAfterAFailure(t *testing.T) {
	m := bare(t)
	ctx := context.Background()
	c, _, err := m.claim(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	m.settle("web", c, "", errors.New("cancelled"))
	c, id, err := m.claim(ctx, "web")
	if err != nil || id != "" {
		t.Fatalf("second claim: %q, %v", id, err)
	}
	m.settle("web", c, podA, nil)
	if _, _, err := m.claim(ctx, "web"); !errors.Is(err, errdefs.ErrAlreadyExists) || !strings.Contains(err.Error(), podA) {
		t.Errorf("claim of a name in use: %v", err)
	}
	m.freeName("web", podB) // another pod's removal
	if _, _, err := m.claim(ctx, "web"); err == nil {
		t.Error("the name was given up by another pod")
	}
	m.freeName("web", podA)
	if _, _, err := m.claim(ctx, "web"); err != nil {
		t.Error(err)
	}
}

func TestRetryJoinsTheFirstCall(t *testing.T) {
	m := bare(t)
	ctx := context.Background()
	c, _, err := m.claim(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() {
		_, id, err := m.claim(ctx, "web")
		if err != nil {
			id = err.Error()
		}
		got <- id
	}()
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, _, err := m.claim(short, "web"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller who gives up gets %v", err)
	}
	m.settle("web", c, podA, nil)
	if id := <-got; id != podA && !strings.Contains(id, podA) {
		t.Errorf("the retry gets %q", id)
	}
}

func TestExitReasons(t *testing.T) {
	for _, tc := range []struct {
		state  shim.State
		reason string
	}{
		{shim.State{ExitCode: 0}, "Completed"},
		{shim.State{ExitCode: 3}, "Error"},
		{shim.State{ExitCode: 137, OOMKills: 1}, "OOMKilled"},
		{shim.State{ExitCode: 1, OOMKills: 2}, "OOMKilled"},
		{shim.State{ExitCode: 0, OOMKills: 1}, "OOMKilled"}, // a child, as containerd tells it
	} {
		m := bare(t)
		c := m.newContainer(nil, *someContainer(ctrA, podA))
		tc.state.Exited = time.Unix(1700000100, 0)
		c.exit(tc.state)
		v := c.view.Load()
		if v.Reason != tc.reason || v.State != cri.ContainerState_CONTAINER_EXITED || int(v.ExitCode) != tc.state.ExitCode || !v.FinishedAt.Equal(tc.state.Exited) {
			t.Errorf("%+v becomes %+v", tc.state, v)
		}
		c.exit(shim.State{ExitCode: 99}) // told again
		if got := c.view.Load().ExitCode; int(got) != tc.state.ExitCode {
			t.Errorf("a second exit changes the code to %d", got)
		}
		select {
		case <-c.exited:
		default:
			t.Error("nobody who waits is told")
		}
	}
}

func TestLostContainerHasTheExitThatItsShimKept(t *testing.T) {
	m := bare(t)
	c := m.newContainer(nil, *someContainer(ctrA, podA))
	if err := os.MkdirAll(c.dir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.dir(shim.ExitFile), []byte(`{"ID":"`+ctrA+`","ExitCode":7,"Exited":"2026-01-02T03:04:05Z"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c.lost(reasonShim, "gone")
	if v := c.view.Load(); v.ExitCode != 7 || v.Reason != "Error" {
		t.Errorf("exit is %d (%s)", v.ExitCode, v.Reason)
	}
	other := m.newContainer(nil, *someContainer(strings.Replace(ctrA, "c", "d", 1), podA))
	other.lost(reasonShim, "gone")
	if v := other.view.Load(); v.ExitCode != 137 || v.Reason != reasonShim || v.Message != "gone" {
		t.Errorf("exit is %d (%s: %s)", v.ExitCode, v.Reason, v.Message)
	}
}

// A stop that waits for a removal, and whatever else ends after it, must not bring back the record of what is gone.
func TestForgottenRecordsStayGone(t *testing.T) {
	m := bare(t)
	m.podFiles = m.ctrFiles
	p := m.newPod(*somePod(podA))
	c := m.newContainer(p, *someContainer(ctrA, podA))
	for _, tc := range []struct {
		id           string
		save, forget func() error
	}{
		{podA, func() error { return p.update(func(r *podRecord) { r.ShimPID = 0 }) }, p.forget},
		{ctrA, func() error { return c.update(func(r *containerRecord) { r.Signalled = true }) }, c.forget},
	} {
		for i, err := range []error{tc.save(), tc.forget(), tc.save(), tc.forget()} {
			if err != nil {
				t.Errorf("step %d of %s: %v", i, tc.id, err)
			}
		}
		if _, err := os.Stat(m.ctrFiles.path(tc.id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the record of %s is back: %v", tc.id, err)
		}
	}
}

func TestCVE_2026_95839_LogPathIsNotFollowed(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	target := filepath.Join(outside, "target")
	if err := os.WriteFile(target, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(dir, "link.log")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "sub")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo.log"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "dir.log"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link.log", "sub/target", "sub/new", "fifo.log", "dir.log", "../x", "/etc/passwd", "", "a/../../x", "."} {
		if f, err := openLog(dir, name); err == nil {
			_ = f.Close()
			t.Errorf("log path %q was opened", name)
		}
	}
	if got, _ := os.ReadFile(target); string(got) != "untouched" {
		t.Errorf("target is %q", got)
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 1 {
		t.Errorf("outside has %v", entries)
	}
	for _, name := range []string{"0.log", "app/0.log", "a/b/c/0.log"} {
		f, err := openLog(dir, name)
		if err != nil {
			t.Errorf("log path %q: %v", name, err)
			continue
		}
		_ = f.Close()
	}
}

func TestCVE_2026_47262_UserFilesOfAnImage(t *testing.T) {
	root := t.TempDir()
	etc := filepath.Join(root, "etc")
	if err := os.Mkdir(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	passwd := filepath.Join(etc, "passwd")
	for name, make := range map[string]func() error{
		"sparse 5 GB":    func() error { f, err := os.Create(passwd); _ = f.Truncate(5 << 30); _ = f.Close(); return err },
		"fifo":           func() error { return unix.Mkfifo(passwd, 0o600) },
		"directory":      func() error { return os.Mkdir(passwd, 0o700) },
		"link to a loop": func() error { return os.Symlink("passwd", passwd) },
	} {
		_ = os.RemoveAll(passwd)
		if err := make(); err != nil {
			t.Fatal(name, err)
		}
		start := time.Now()
		if data, err := readInRoot(root, "etc/passwd"); err == nil {
			t.Errorf("%s: read %d bytes", name, len(data))
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("%s: took %s", name, took)
		}
	}
	// A link to the host's file is a link inside the image, to what is not there.
	_ = os.RemoveAll(passwd)
	if err := os.Symlink("/etc/shadow", passwd); err != nil {
		t.Fatal(err)
	}
	if data, err := readInRoot(root, "etc/passwd"); err != nil || data != nil {
		t.Errorf("through a link to /etc/shadow came %q, %v", data, err)
	}
	_ = os.Remove(passwd)
	if err := os.WriteFile(passwd, []byte("root:x:0:0::/:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if data, err := readInRoot(root, "etc/passwd"); err != nil || len(data) == 0 {
		t.Errorf("an ordinary file: %q, %v", data, err)
	}
}

func TestExecOutputIsBounded(t *testing.T) {
	room := &budget{left: 10, all: &pool{}}
	out, errs := &bounded{room: room}, &bounded{room: room}
	for range 3 {
		if n, err := out.Write([]byte("abcd")); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := errs.Write([]byte("x")); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	if got := string(out.bytes()) + "|" + string(errs.bytes()); got != "abcdabcd|xx" {
		t.Errorf("kept %q", got)
	}
}

// CVE-2022-31030: not each of them may keep as much as one alone.
func TestExecOutputOfAllIsBoundedTogether(t *testing.T) {
	var all pool
	data := make([]byte, 1<<20)
	var rooms []*budget
	total := 0
	for range 40 {
		room := &budget{left: maxExecOutput, all: &all}
		rooms = append(rooms, room)
		out := &bounded{room: room}
		for range 20 {
			if n, err := out.Write(data); n != len(data) || err != nil {
				t.Fatal(n, err)
			}
		}
		if len(out.bytes()) < keptEach {
			t.Errorf("one keeps %d bytes only", len(out.bytes()))
		}
		total += len(out.bytes())
	}
	if total > maxKept+40*keptEach {
		t.Errorf("together they keep %d bytes", total)
	}
	for _, room := range rooms {
		room.release()
		room.release() // once is enough
	}
	if out := (&bounded{room: &budget{left: maxExecOutput, all: &all}}); all.used != 0 {
		t.Errorf("%d bytes stay taken", all.used)
	} else if _, _ = out.Write(make([]byte, 20<<20)); len(out.bytes()) != maxExecOutput {
		t.Errorf("one alone keeps %d bytes, want %d", len(out.bytes()), maxExecOutput)
	}
}

func TestSessionsAreBounded(t *testing.T) {
	p := &pod{rec: *somePod(podA)}
	var ends []func()
	for range maxExecs {
		end, err := p.session()
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	if _, err := p.session(); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("one too many: %v", err)
	}
	ends[0]()
	if _, err := p.session(); err != nil {
		t.Error(err)
	}
}

// What a shim answers when a container ends under a call is no failure of the daemon's.
func TestErrorsOfShimsHaveAClass(t *testing.T) {
	for _, tc := range []struct{ err, class error }{
		{&shim.Error{Code: shim.CodeState, Message: "container is exited"}, errdefs.ErrFailedPrecondition},
		{&shim.Error{Code: shim.CodeNotFound, Message: "no container"}, errdefs.ErrFailedPrecondition},
		{&shim.Error{Code: shim.CodeDeadline, Message: "not created within 1s"}, context.DeadlineExceeded},
		{fmt.Errorf("shim create: %w", shim.ErrGone), errdefs.ErrUnavailable},
		{shim.ErrExecServerGone, errdefs.ErrUnavailable},
	} {
		if err := ofShim(tc.err); !errors.Is(err, tc.class) || !strings.HasPrefix(err.Error(), tc.err.Error()) {
			t.Errorf("%v becomes %v", tc.err, err)
		}
	}
	if ofShim(nil) != nil {
		t.Error("no error becomes one")
	}
}

func TestExecInAContainerThatEnds(t *testing.T) {
	rec := someContainer(ctrA, podA)
	rec.PID = os.Getpid()
	c := bare(t).newContainer(nil, *rec)
	lost := errors.New("root of the container: no such file or directory")
	if err := c.execFailed(lost); !errors.Is(err, lost) || errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("in one that runs: %v", err)
	}
	go c.exit(shim.State{})
	if err := c.execFailed(lost); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "exited") {
		t.Errorf("in one that ends: %v", err)
	}
}
