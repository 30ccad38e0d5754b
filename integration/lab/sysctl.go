package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// kernelSettings are written by every kubelet at its start (pkg/kubelet/cm, setupKernelTunables) unless the machine has
// them already, and the last by HoldSettings.
var kernelSettings = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
	"kernel/keys/root_maxbytes", inotifyInstances,
}

// inotifyInstances bounds what all programs of root have together: a kubelet has six, a control plane twelve, and a kernel allows 128 by
// itself. Without one more a kubelet goes on, and has no cAdvisor.
const (
	inotifyInstances = "fs/inotify/max_user_instances"
	wantedInstances  = 1024
)

// settingsFile holds the settings as they were before the first kubelet of this package. It goes with the last one; when a
// test is killed it stays, and the next test puts the settings back.
const settingsFile = "/run/berth-lab-sysctl.json"

// keptSettings is the share of one kubelet in the machine's kernel settings: a shared lock on the file.
type keptSettings struct{ file *os.File }

// keepSettings notes the kernel settings before a kubelet changes them, unless another kubelet's test has done so.
func keepSettings() (*keptSettings, error) {
	for {
		f, err := os.OpenFile(settingsFile, os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		k := &keptSettings{f}
		err = k.note()
		if errors.Is(err, errReplaced) {
			_ = f.Close()
			continue
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("keep kernel settings: %w", err), f.Close())
		}
		return k, nil
	}
}

// errReplaced: the last of the others removed the file after it was opened here.
var errReplaced = errors.New("the file was removed")

func (k *keptSettings) note() error {
	// Who gets the file for itself is the first; who does not waits for the first to have written.
	err := flock(k.file, syscall.LOCK_EX|syscall.LOCK_NB)
	first := err == nil
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = flock(k.file, syscall.LOCK_SH)
	}
	if err != nil {
		return err
	}
	mine, err := k.file.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(settingsFile); err != nil || !os.SameFile(mine, there) {
		return errReplaced
	}
	if !first {
		return nil
	}
	if mine.Size() == 0 { // otherwise a test was killed: these are the settings from before it
		if err := k.write(); err != nil {
			return err
		}
	}
	return flock(k.file, syscall.LOCK_SH)
}

func (k *keptSettings) write() error {
	values := map[string]string{}
	for _, name := range kernelSettings {
		value, err := os.ReadFile("/proc/sys/" + name)
		if errors.Is(err, os.ErrNotExist) {
			continue // this kernel has it not
		}
		if err != nil {
			return err
		}
		values[name] = string(value)
	}
	text, err := json.Marshal(values)
	if err != nil {
		return err
	}
	_, err = k.file.WriteAt(text, 0)
	return err
}

// release puts the settings back, unless another kubelet still runs.
func (k *keptSettings) release() error {
	defer func() { _ = k.file.Close() }()
	if err := flock(k.file, syscall.LOCK_EX|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return nil // the last one does it
	} else if err != nil {
		return err
	}
	text := make([]byte, 4096)
	n, err := k.file.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var values map[string]string
	if err := json.Unmarshal(text[:n], &values); err != nil {
		return fmt.Errorf("%s: %w", settingsFile, err)
	}
	for name, value := range values {
		now, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			return err
		}
		if string(now) != value {
			if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
				return err
			}
		}
	}
	return os.Remove(settingsFile)
}

// HoldSettings keeps the kernel settings for as long as somebody has the file open, with instances of inotify for many nodes: for a kubelet
// that is given it, and outlives this process. RestoreSettings puts them back afterwards.
func HoldSettings() (*os.File, error) {
	k, err := keepSettings()
	if err != nil {
		return nil, err
	}
	if err := raise(inotifyInstances, wantedInstances); err != nil {
		return nil, errors.Join(err, k.release())
	}
	return k.file, nil
}

// raise makes a setting at least so large.
func raise(name string, least int) error {
	file := "/proc/sys/" + name
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || now >= least {
		return err
	}
	return os.WriteFile(file, []byte(strconv.Itoa(least)), 0o644)
}

// RestoreSettings puts back the kernel settings, unless a kubelet still runs; for kubelets that were killed.
func RestoreSettings() error {
	f, err := os.OpenFile(settingsFile, os.O_RDWR|syscall.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return (&keptSettings{f}).release()
}

func flock(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
