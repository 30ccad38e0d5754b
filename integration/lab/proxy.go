package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// StartProxy starts `berth proxy` in a network namespace, a path, with its output in a file. It does not wait for anything.
func StartProxy(netns, log string, args ...string) (*Process, error) {
	program, err := berthProgram()
	if err != nil {
		return nil, err
	}
	return StartIn(netns, "berth proxy", log, nil, program, append([]string{"proxy"}, args...)...)
}

// CleanProxy runs `berth proxy --cleanup` in the network namespace of the calling thread.
func CleanProxy() (string, error) { return RunBerth("proxy", "--cleanup") }

// RunBerth runs a command of berth there, and has its output.
func RunBerth(args ...string) (string, error) {
	program, err := berthProgram()
	if err != nil {
		return "", err
	}
	return runCommand(exec.Command(program, args...))
}

// berthProgram is the one that `make build` has built.
func berthProgram() (string, error) {
	root, err := RepoRoot()
	if err != nil {
		return "", err
	}
	program := filepath.Join(root, "bin", "berth")
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("%w: run `make build` first", err)
	}
	return program, nil
}
