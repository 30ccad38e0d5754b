package main

/*
#cgo pkg-config: libseccomp
#cgo LDFLAGS: -Wl,--wrap=seccomp_init -Wl,--wrap=seccomp_arch_add -Wl,--wrap=seccomp_attr_set
#cgo LDFLAGS: -Wl,--wrap=seccomp_rule_add_array -Wl,--wrap=seccomp_export_bpf
#include "seccomp_record.h"
*/
import "C"

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/internal/file"
)

// seccomp.c says what a record is. Each is made once, by a process of the host that has nothing else to do, and lies in a
// directory that all shims share; each container has a link to its own beside libcontainer's state, for the init and for
// execs, whatever becomes of the directory. Without one libseccomp compiles as ever, which only takes longer.

// maxRecords is how many records the shared directory keeps. Nodes have a handful of profiles.
const maxRecords = 32

// recordName is the name of a container's record.
const recordName = "seccomp.record"

// recordLine tells an init, behind its log level, the record to follow.
func recordLine(stateRoot, id string) string {
	return "seccomp:" + filepath.Join(stateRoot, id, recordName)
}

// linkRecord gives the container whose state is in state the record of its profile, as a link to the one in dir. Where
// there is none it is made, and dir given a link to it: what is in dir may go at any time.
func linkRecord(dir, state string, profile *configs.Seccomp) error {
	data, err := json.Marshal(profile)
	if err != nil {
		return err
	}
	name, err := recordFileName(data)
	if err != nil {
		return err
	}
	shared, own := filepath.Join(dir, name), filepath.Join(state, recordName)
	if err := os.Link(shared, own); err == nil {
		now := time.Now()
		return os.Chtimes(own, now, now)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	record, err := makeRecord(data)
	if err != nil {
		return err
	}
	if err := file.Replace(own, record); err != nil {
		return err
	}
	if err := os.Link(own, shared); err != nil && !errors.Is(err, fs.ErrExist) { // somebody else has made it meanwhile
		return err
	}
	keepNewest(dir, maxRecords)
	return nil
}

// recordFileName names the record of a profile.
func recordFileName(profile []byte) (string, error) {
	// Another program may have another libseccomp. This one is a file in memory that each daemon makes anew.
	var exe unix.Stat_t
	if err := unix.Stat(shim.SelfExe, &exe); err != nil {
		return "", &os.PathError{Op: "stat", Path: shim.SelfExe, Err: err}
	}
	sum := sha256.Sum256(fmt.Appendf(profile, "\n%d %d %d.%09d", exe.Dev, exe.Ino, exe.Ctim.Sec, exe.Ctim.Nsec))
	return hex.EncodeToString(sum[:]), nil
}

// makeRecord has a process of its own compile a profile, which is JSON of libcontainer.
func makeRecord(profile []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), recordTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, shim.SelfExe)
	cmd.Args = []string{"berth-shim", "seccomp"}
	cmd.Stdin, cmd.Stderr = bytes.NewReader(profile), os.Stderr
	record, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("compile seccomp profile: %w", err)
	}
	return record, nil
}

// recordTime bounds how long that may take. The default profile takes 10 ms.
const recordTime = 10 * time.Second

// record is that process: it reads a profile, and ends with the record written to its standard output.
func record(profile io.Reader) error {
	var config configs.Seccomp
	if err := json.NewDecoder(profile).Decode(&config); err != nil {
		return err
	}
	C.berth_seccomp_record(1)
	_, err := seccomp.InitSeccomp(&config)
	return cmp.Or(err, errors.New("libcontainer has loaded a filter that it has not exported"))
}

// keepNewest removes all but so many files of dir: those that nobody has asked for the longest. Others may do the same
// meanwhile.
func keepNewest(dir string, number int) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	used := map[string]time.Time{}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			used[e.Name()] = info.ModTime()
		}
	}
	names := slices.SortedFunc(maps.Keys(used), func(a, b string) int { return used[b].Compare(used[a]) })
	for _, name := range names[min(number, len(names)):] {
		_ = os.Remove(filepath.Join(dir, name))
	}
}
