package socket

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain is also the process that has a name, as root or as nobody, and hands it on to one that writes nothing and ends when its
// input does.
func TestMain(m *testing.M) {
	if name := os.Getenv("SOCKET_TEST_ONLY"); name != "" {
		only, err := Only(context.Background(), name)
		if err == nil {
			err = heir(only)
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("has it")
		select {}
	}
	os.Exit(m.Run())
}

// heir hands a name on to a program that reads descriptor 4, which lives as long as the test has the other end.
func heir(only *Name) error {
	f, err := only.File()
	if err != nil || f == nil || os.Getenv("SOCKET_TEST_HEIR") == "" {
		return err
	}
	cmd := exec.Command("cat")
	cmd.Stdin, cmd.ExtraFiles = os.NewFile(4, "input"), []*os.File{f}
	return cmd.Start()
}

func holder(t *testing.T, name string, who *syscall.Credential, input ...*os.File) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/fd/3")
	program, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	cmd.ExtraFiles = append([]*os.File{program}, input...)
	cmd.Env = append(os.Environ(), "SOCKET_TEST_ONLY="+name)
	if len(input) > 0 {
		cmd.Env = append(cmd.Env, "SOCKET_TEST_HEIR=1")
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line := make([]byte, 100)
	if n, err := out.Read(line); err != nil || !strings.HasPrefix(string(line[:n]), "has it") {
		t.Fatalf("%q, %v", line[:n], err)
	}
	return cmd
}

func TestOnlyOneHasAName(t *testing.T) {
	name := fmt.Sprint("berth-test-", os.Getpid())
	first := holder(t, name, nil)
	for range 300 { // more than a queue of connections is long
		_, err := Only(t.Context(), name)
		if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint("process ", first.Process.Pid)) {
			t.Fatalf("the second: %v", err)
		}
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	mine, err := Only(t.Context(), name)
	if err != nil {
		t.Fatalf("the first was killed: %v", err)
	}
	if err := mine.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Only(t.Context(), name)
	if err != nil {
		t.Fatalf("it was closed: %v", err)
	}
	_ = again.Close()
}

// What a process has started and given its name to has it for as long as it lives, also when the process is killed.
func TestNameIsHandedOn(t *testing.T) {
	name := fmt.Sprint("berth-test-heir-", os.Getpid())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	first := holder(t, name, nil, r)
	_ = r.Close()
	_ = first.Process.Kill()
	_ = first.Wait()
	want := fmt.Sprintf("a program that process %d has started", first.Process.Pid)
	if _, err := Only(t.Context(), name); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), want) {
		t.Fatalf("%v, want %s", err, want)
	}
	_ = w.Close()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		only, err := Only(t.Context(), name)
		if err == nil {
			_ = only.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it has ended: %v", err)
		}
	}
}

// The name is there for all who are in the network namespace, a pod of the node's network included.
func TestNameThatIsKeptFromUs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	name := fmt.Sprint("berth-test-nobody-", os.Getpid())
	holder(t, name, &syscall.Credential{Uid: 65534, Gid: 65534})
	only, err := Only(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	_ = only.Close()
}
