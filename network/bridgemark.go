package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// The bridge of the default network has its name by the range of its addresses, and who gives these out keeps them in a directory
// of its own: two daemons of a node, each with its root, would come to one bridge and give the same addresses to pods of both. So
// a bridge is marked with whose it is, by its alias, which stays as long as the bridge does, whether or not a daemon runs.

// markPrefix begins the alias of a bridge of ours; the directory of the results of plugins follows.
const markPrefix = "berth default network of "

// mostAlias is the longest alias that the kernel takes (IFALIASZ without its end).
const mostAlias = 255

// elsewhere says whose the default network's bridge is, if it is another's: of a daemon with another root, which is still there.
// The bridge is nil where there is none.
func (m *Manager) elsewhere(bridge string) (netlink.Link, error) {
	link, err := netlink.LinkByName(bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("bridge %s: %w", bridge, err)
	}
	owner, marked := strings.CutPrefix(link.Attrs().Alias, markPrefix)
	if !marked || m.isOwn(owner) {
		return link, nil
	}
	if _, err := os.Stat(owner); errors.Is(err, fs.ErrNotExist) {
		return link, nil // left by one that has gone
	}
	return link, fmt.Errorf("bridge %s is that of another berth on this node, with its addresses in %s: pods of both would get the same; give this one another range (--pod-cidr), or remove the pods of that one, and the bridge (ip link delete %s)",
		bridge, owner, bridge)
}

// isOwn says whether a mark is this manager's, whatever path leads there.
func (m *Manager) isOwn(owner string) bool {
	if owner == m.owner() {
		return true
	}
	theirs, err := os.Stat(owner)
	ours, oerr := os.Stat(m.opts.CacheDir)
	return err == nil && oerr == nil && os.SameFile(theirs, ours)
}

// owner is how this manager is named in marks.
func (m *Manager) owner() string {
	dir, err := filepath.Abs(m.opts.CacheDir)
	if err != nil {
		return m.opts.CacheDir
	}
	return dir
}

// mark has the default network's bridge say that it is ours, if there is one, and be as it must. An alias that says something else
// is left alone.
func (m *Manager) mark(bridge string) error {
	link, err := m.elsewhere(bridge)
	if err != nil || link == nil {
		return err
	}
	if err := m.seeBridged(link); err != nil {
		return err
	}
	alias := markPrefix + m.owner()
	now := link.Attrs().Alias
	if now == alias || now != "" && !strings.HasPrefix(now, markPrefix) || len(alias) > mostAlias {
		return nil
	}
	if err := netlink.LinkSetAlias(link, alias); err != nil {
		return fmt.Errorf("bridge %s: set its alias: %w", bridge, err)
	}
	_, err = m.elsewhere(bridge) // of two that do it at once the last has it
	return err
}

// ownBridge marks the bridge where pods of ours are on it (it is an earlier version's, say), and refuses another's.
func (m *Manager) ownBridge(bridge string) error {
	if m.podsElsewhere("")[bridge] > 0 {
		return m.mark(bridge)
	}
	_, err := m.elsewhere(bridge)
	return err
}
