package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// An intent is a file that says of a pod what its ADD is about to use. It is on the disk, not just in the kernel's memory,
// before the first plugin runs: what plugins do outlives a power cut (an address of host-local, an entry in an add-on's
// database), and neither the pod's record nor the result of its plugins need to (containernetworking/cni#1055). It goes when
// all plugins have undone their work.
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
}

func (m *Manager) intentsDir() string          { return filepath.Join(m.opts.CacheDir, "intents") }
func (m *Manager) intentFile(id string) string { return filepath.Join(m.intentsDir(), id) }

// intend has an intent on the disk when it returns.
func (m *Manager) intend(p Pod, c *conflist) error {
	p.Conflist = c.Bytes
	data, err := json.Marshal(intent{p, m.boot})
	if err == nil {
		err = os.MkdirAll(m.intentsDir(), 0o700)
	}
	if err == nil {
		// In place: a power cut that leaves half of it leaves the name, and that has the pod's id.
		err = writeSynced(m.intentFile(p.ID), data)
	}
	if err != nil {
		return fmt.Errorf("note that it is to be added: %w", err)
	}
	return nil
}

// writeSynced writes a file, and has it and its name on the disk.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// recallIntents has those that were done before a reboot done again: the disk may not know.
func (m *Manager) recallIntents() {
	for _, file := range m.doneIntents() {
		data, err := readBounded(file)
		var i intent
		if err == nil {
			err = json.Unmarshal(data, &i)
		}
		if err == nil && i.Boot == m.boot {
			continue
		}
		if err := os.Rename(file, strings.TrimSuffix(file, doneSuffix)); err != nil {
			m.log.Warn("that a pod's network was released just before the node was restarted is not checked", "file", file, "error", err)
		}
	}
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

// forgetIntents removes those that were done some time ago.
func (m *Manager) forgetIntents() {
	for _, file := range m.doneIntents() {
		if st, err := os.Stat(file); err == nil && time.Since(st.ModTime()) > doneFor {
			_ = os.Remove(file) // if not now, then in the next round
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
