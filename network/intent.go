package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network/cni"
)

// An intent is a file that says of a pod what its ADD is about to use, made before the first plugin runs: what plugins do
// outlives a power cut (an address of host-local, an entry in an add-on's database), and neither the pod's record nor the
// result of its plugins need to (containernetworking/cni#1055). It goes when all plugins have undone their work.
//
// Where plugins keep what they do elsewhere, which only they know, an intent is on the disk before they run, and not just in
// the kernel's memory. That takes 2 ms on an idle disk, and 30 and more beside a busy neighbour. Plugins in process keep
// addresses alone, and mostly on the same file system: of what is made there the disk has nothing without what was made
// before it, so that an address is not there without the name of an intent, which has the pod's id.
//
// DEL may be undone by a power cut, too, where plugins keep what they know on another file system than this one: there the
// address is taken again. So an intent that is done stays, under another name, until that must be on the disk; one that is
// found after a reboot is done again.

const (
	// doneSuffix marks the intents of pods that have been torn down.
	doneSuffix = ".done"
	// doneFor is how long these are kept: twice as long as the kernel keeps what was written in memory (dirty_expire_centisecs).
	doneFor = time.Minute
)

// intent is the content of the file.
type intent struct {
	Pod  Pod
	Boot string // boot id of the kernel that ADD ran under
	// Refused are the types of plugins that could not read their configuration at ADD.
	Refused []string `json:",omitempty"`
}

func (m *Manager) intentsDir() string          { return filepath.Join(m.opts.CacheDir, "intents") }
func (m *Manager) intentFile(id string) string { return filepath.Join(m.intentsDir(), id) }

// intend makes an intent, which no power cut loses without what the plugins do.
func (m *Manager) intend(p Pod, c *conflist) error {
	p.Conflist = c.Bytes
	data, err := json.Marshal(intent{Pod: p, Boot: m.boot})
	if err == nil {
		err = os.MkdirAll(m.intentsDir(), 0o700)
	}
	if err == nil {
		// In place: a power cut that leaves half of it leaves the name, and that has the pod's id.
		err = writeInPlace(m.intentFile(p.ID), data, m.keptElsewhere(c))
	}
	if err != nil {
		return fmt.Errorf("note that it is to be added: %w", err)
	}
	return nil
}

// keptElsewhere tells whether plugins keep what they do for a pod anywhere but on the file system of its intent.
func (m *Manager) keptElsewhere(c *conflist) bool {
	for _, p := range c.Plugins {
		if !m.inProcess(p.Network.Type) {
			return true
		}
		switch ipam := p.Network.IPAM.Type; {
		case ipam == "":
		case !m.inProcess(ipam):
			return true
		case ipam == "host-local" && !m.besideIntents(hostLocalDir(p.Bytes)):
			return true
		}
	}
	return false
}

func (m *Manager) inProcess(typ string) bool {
	who, err := m.plugins.FindInPath(typ, m.opts.BinDirs)
	return err == nil && strings.HasPrefix(who, answered)
}

// hostLocalDir is the directory in which the host-local of a plugin's configuration has the addresses of its networks.
func hostLocalDir(config []byte) string {
	var conf struct {
		IPAM struct {
			DataDir string `json:"dataDir"`
		} `json:"ipam"`
	}
	if err := json.Unmarshal(config, &conf); err != nil {
		return "" // the plugin will say so
	}
	return cmp.Or(conf.IPAM.DataDir, cni.DefaultDataDir)
}

// besideIntents tells whether a directory that may not be there yet is, or will be, on the file system of the intents.
func (m *Manager) besideIntents(dir string) bool {
	var is, intents unix.Stat_t
	err := unix.Stat(dir, &is)
	for errors.Is(err, unix.ENOENT) && filepath.Dir(dir) != dir {
		dir = filepath.Dir(dir)
		err = unix.Stat(dir, &is)
	}
	return err == nil && unix.Stat(m.intentsDir(), &intents) == nil && is.Dev == intents.Dev
}

// writeInPlace writes a file. If synced, it and its name are on the disk when it returns.
func writeInPlace(path string, data []byte, synced bool) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && synced {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	if !synced {
		return nil
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// recallIntents has those that were done before a reboot done again: the disk may not know. A torn one does not say when ADD ran, but its file
// when it was done.
func (m *Manager) recallIntents() {
	for _, file := range m.doneIntents() {
		data, err := readBounded(file)
		var i intent
		if err == nil {
			err = json.Unmarshal(data, &i)
		}
		if err == nil && i.Boot == m.boot || err != nil && sinceBoot(file) {
			continue
		}
		if err := os.Rename(file, strings.TrimSuffix(file, doneSuffix)); err != nil {
			m.log.Warn("that a pod's network was released just before the node was restarted is not checked", "file", file, "error", err)
		}
	}
}

// sinceBoot is whether a file was last written under this kernel.
func sinceBoot(file string) bool {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return false
	}
	st, err := os.Stat(file)
	return err == nil && time.Since(st.ModTime()) < time.Duration(up.Nano())
}

func (m *Manager) doneIntents() []string {
	done, _ := filepath.Glob(m.intentFile("*" + doneSuffix)) // the pattern is right
	return done
}

// intended is what was noted of a pod; ok is false where there is no file. Of a torn one the id is all that is known.
func (m *Manager) intended(id string) (i intent, ok bool) {
	data, err := readBounded(m.intentFile(id))
	if errors.Is(err, os.ErrNotExist) {
		return intent{}, false
	}
	if err == nil {
		err = json.Unmarshal(data, &i)
	}
	if err != nil || i.Pod.ID != id {
		m.log.Warn("what a pod was about to be added to is torn", "file", m.intentFile(id), "error", err)
		i = intent{Pod: Pod{ID: id}}
	}
	return i, true
}

// fulfilled notes that nothing is left of a pod.
func (m *Manager) fulfilled(id string) {
	file := m.intentFile(id)
	now := time.Now()
	err := os.Rename(file, file+doneSuffix)
	if err == nil {
		err = os.Chtimes(file+doneSuffix, now, now)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		m.log.Warn("that the network of a pod is released cannot be noted: it is done again at the next start", "pod", id, "error", err)
	}
}

// forgetIntents removes those that were done some time ago. One that was done later than now, by a clock that has been set back since, is
// taken for one that was done just now: it would stay for as long as the clock was ahead.
func (m *Manager) forgetIntents() {
	now := time.Now()
	for _, file := range m.doneIntents() {
		st, err := os.Stat(file)
		switch {
		case err != nil:
		case st.ModTime().After(now):
			_ = os.Chtimes(file, now, now) // if not now, then in the next round
		case now.Sub(st.ModTime()) > doneFor:
			_ = os.Remove(file)
		}
	}
}

// collectIntents tears down the pods of intents that keep does not know. What cannot be is tried again in the background.
func (m *Manager) collectIntents(ctx context.Context, keep func(id string) bool) error {
	entries, err := os.ReadDir(m.intentsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("pods that were about to be added: %w", err)
	}
	var errs []error
	for _, e := range entries {
		id := e.Name()
		if filepath.Ext(id) == doneSuffix || keep(id) {
			continue
		}
		i, ok := m.intended(id)
		if !ok {
			continue
		}
		if len(i.Pod.Conflist) == 0 {
			if _, err := m.current(); err != nil {
				continue // what there is to know is on the node, if not now then later; the reason is shown by Ready
			}
		}
		if err := m.Teardown(ctx, i.Pod); err != nil {
			errs = append(errs, m.Owe(i.Pod, withContext(ctx, err)))
		}
	}
	return errors.Join(errs...)
}
