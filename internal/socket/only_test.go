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
)

// TestMain is also the process that has a name, as root or as nobody.
func TestMain(m *testing.M) {
	if name := os.Getenv("SOCKET_TEST_ONLY"); name != "" {
		if _, err := Only(context.Background(), name); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("has it")
		select {}
	}
	os.Exit(m.Run())
}

func holder(t *testing.T, name string, who *syscall.Credential) *exec.Cmd {
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
	cmd.ExtraFiles = []*os.File{program}
	cmd.Env = append(os.Environ(), "SOCKET_TEST_ONLY="+name)
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
