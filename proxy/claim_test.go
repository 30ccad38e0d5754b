package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/internal/socket"
)

const claimEnv = "BERTH_TEST_CLAIM"

// claimer is another process that has the claim, until it is killed.
func claimer(t *testing.T, name string) *exec.Cmd {
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run=^TestClaimer$")
	c.Env = append(os.Environ(), claimEnv+"="+name)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "claimed\n" {
		t.Fatalf("%q %v", line, err)
	}
	return c
}

// TestClaimer is the other process.
func TestClaimer(t *testing.T) {
	name := os.Getenv(claimEnv)
	if name == "" {
		t.Skip("a helper of others")
	}
	if _, err := take(t.Context(), name, 0, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	fmt.Println("claimed")
	select {}
}

func TestASecondProxyIsRefusedAndNamesTheFirst(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	name := fmt.Sprintf("berth-test-claim-%d", os.Getpid())
	if who := socket.Holder(t.Context(), name); who != "" {
		t.Fatal(who)
	}
	other := claimer(t, name)
	pid := fmt.Sprintf("process %d", other.Process.Pid)
	if who := socket.Holder(t.Context(), name); who != pid {
		t.Errorf("%q, want %s", who, pid)
	}
	if _, err := take(t.Context(), name, 300*time.Millisecond, log); !errors.Is(err, ErrClaimed) || !strings.Contains(err.Error(), pid) {
		t.Fatalf("%v", err)
	}
	// One that is killed has no claim; who waits has it then.
	time.AfterFunc(200*time.Millisecond, func() { _ = other.Process.Kill() })
	c, err := take(t.Context(), name, time.Minute, log)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if c, err = take(t.Context(), name, 0, log); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}
