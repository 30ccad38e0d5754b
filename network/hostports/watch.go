package hostports

import (
	"time"

	"github.com/berth-run/berth/internal/nftables"
)

const (
	// settle is how long a burst of changes may take to be seen as one.
	settle = 50 * time.Millisecond
	// atMostEvery is how often it is looked what has become of the table, however busy others are with theirs.
	atMostEvery = time.Second
	// atLeastEvery finds what was not told.
	atLeastEvery = 10 * time.Second
)

// Watch checks the table whenever somebody has changed nf_tables, and now and then, until stop is closed.
func (t *Table) Watch(stop <-chan struct{}) {
	var changes <-chan struct{}
	if told, err := nftables.WatchTransactions(); err != nil {
		t.log.Debug("changes of nf_tables are not told, and looked for every ten seconds", "error", err)
	} else {
		defer func() { _ = told.Close() }()
		changes = told.C
	}
	poll := time.NewTicker(atLeastEvery)
	defer poll.Stop()
	var last time.Time
	due := time.After(settle) // for what nobody was there to be told
	said := ""
	for {
		select {
		case <-stop:
			return
		case <-changes:
			if due == nil {
				due = time.After(max(settle, time.Until(last.Add(atMostEvery))))
			}
			continue
		case <-due:
		case <-poll.C:
		}
		due, last = nil, time.Now()
		now := ""
		if err := t.Check(); err != nil {
			if now = err.Error(); now != said {
				t.log.Warn("host ports of pods cannot be checked", "error", err)
			}
		}
		said = now
	}
}
