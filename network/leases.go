package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// leasesDir is where host-local keeps the addresses of default networks, in directories by their names.
func (m *Manager) leasesDir() string { return filepath.Join(m.opts.CacheDir, "networks") }

// collectLeases gives back addresses of default networks, which nobody else uses, that belong to no pod that keep knows. A
// power cut leaves them: of what was written last, the pod's record and its result may be lost, or whose address it is.
func (m *Manager) collectLeases(keep func(id string) bool) error {
	files, err := filepath.Glob(filepath.Join(m.leasesDir(), DefaultPrefix+"*", "*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		name := filepath.Base(file)
		if name == "lock" || strings.HasPrefix(name, "last_reserved_ip.") {
			continue
		}
		data, err := readBounded(file)
		id, _, _ := strings.Cut(strings.TrimSpace(string(data)), "\r\n")
		if err == nil && !keep(id) {
			m.log.Warn("an address that belongs to no pod is given back", "address", name, "network", filepath.Base(filepath.Dir(file)), "pod", id)
			err = os.Remove(file)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("address %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
