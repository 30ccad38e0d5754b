package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containernetworking/cni/pkg/version"
)

// Since version 1.1 of the specification plugins say by STATUS whether they could serve an ADD: the agent of an add-on may not
// be up yet, a range may be used up. They are asked in the background, so that one that hangs holds up nobody who wants to
// know. Only [Manager.Ready] goes by the answer, which may be some seconds old; an ADD is told by the plugin itself.

const (
	// statusHolds is how long an answer is good for, statusAgain how long one is that says no.
	statusHolds = 10 * time.Second
	statusAgain = pollEvery / 2 // with each poll, whose rounds are not quite even
	// statusTime is for all plugins of a network together.
	statusTime = 10 * time.Second
	// statusQuiet is for how long another reason of the same state is not logged.
	statusQuiet = time.Minute
)

// pluginStatus is what the plugins of a network have answered. The manager's mu guards it.
type pluginStatus struct {
	of     string // the configuration that they are asked with, "" for one that knows no STATUS
	err    error  // why they could not serve an ADD
	at     time.Time
	logged time.Time
	asking context.CancelFunc // of a question under way
}

var errNoStatusYet = errors.New("its plugins have not answered STATUS yet")

// hasStatus says whether the plugins of a network may be asked.
func hasStatus(c *conflist) bool {
	since, err := version.GreaterThanOrEqualTo(c.CNIVersion, "1.1.0")
	return err == nil && since
}

// renew begins anew where a network is not the one that was asked about.
func (s *pluginStatus) renew(c *conflist) {
	of := ""
	if c != nil && hasStatus(c) {
		of = string(c.Bytes)
	}
	if s.of == of {
		return
	}
	if s.asking != nil {
		s.asking()
	}
	*s = pluginStatus{of: of}
	if of != "" {
		s.err = fmt.Errorf("network %s (%s): %w", c.Name, c.from(), errNoStatusYet)
	}
}

// due says whether it is time to ask. One question is under way at a time.
func (s *pluginStatus) due() bool {
	holds := statusHolds
	if s.err != nil {
		holds = statusAgain
	}
	return s.of != "" && s.asking == nil && time.Since(s.at) >= holds
}

// askStatus has the plugins asked unless their last answer is still good, and does not wait. The watch alone calls it.
func (m *Manager) askStatus() {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.conflist
	select {
	case <-m.stop:
		return
	default:
	}
	if !m.status.due() {
		return
	}
	within := cmp.Or(m.opts.statusTime, statusTime)
	ctx, cancel := context.WithTimeout(context.Background(), within)
	m.status.asking = cancel
	m.stopped.Go(func() {
		defer cancel()
		err := m.cni.GetStatusNetworkList(ctx, c.NetworkConfigList)
		if errors.Is(ctx.Err(), context.Canceled) {
			return // given up; that network may be the one again that others have been asked about since
		}
		if err != nil {
			err = fmt.Errorf("network %s (%s): %w", c.Name, c.from(), err)
		}
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w (no answer to STATUS within %s)", err, within)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.status.of == string(c.Bytes) {
			m.answered(c, err)
		}
	})
}

// answered takes an answer over, and logs what has changed. The caller holds mu.
func (m *Manager) answered(c *conflist, err error) {
	s := &m.status
	was, now := s.err, time.Now()
	s.err, s.at, s.asking = err, now, nil
	switch {
	case err == nil && was != nil:
		m.log.Info("the plugins of the network are ready", "network", c.Name, "from", c.from())
		s.logged = time.Time{}
	case err != nil && (was == nil || was.Error() != err.Error()) && now.Sub(s.logged) > statusQuiet:
		m.log.Warn("network is not ready", "reason", err)
		s.logged = now
	}
}

// endStatus gives up the question that is under way.
func (m *Manager) endStatus() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.status.asking != nil {
		m.status.asking()
	}
}
