package cgroups

import (
	"bytes"
	"os"
	"testing"
)

func TestExpectedMoveMovesNobody(t *testing.T) {
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	ExpectMove()
	after, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("this process is in\n%swas in\n%s%v", after, before, err)
	}
}
