package nft

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
)

// watcher sees what others change in the tables.
type watcher struct {
	changed chan string
	events  *nftables.Events
	done    chan struct{}
}

// newWatcher watches the tables of a name. Changes that come from sockets of the ports are not told.
func newWatcher(table string, own ...uint32) (*watcher, error) {
	events, err := nftables.Watch(own...)
	if err != nil {
		return nil, err
	}
	w := &watcher{changed: make(chan string, 1), events: events, done: make(chan struct{})}
	go w.run(table)
	return w, nil
}

func (w *watcher) run(table string) {
	defer close(w.done)
	touched := false
	for {
		err := w.events.Next(func(e nftables.Event) {
			switch {
			case e.Kind == unix.NFT_MSG_NEWGEN && touched: // the end of a transaction
				w.tell(e.Process)
				touched = false
			case e.Table == table && (e.Family == unix.NFPROTO_IPV4 || e.Family == unix.NFPROTO_IPV6):
				touched = true
			}
		})
		switch {
		case errors.Is(err, nftables.ErrOverrun):
			touched = false
			w.tell("")
		case err != nil:
			return
		}
	}
}

// tell says that there was a change; a reader that is behind gets one value for several.
func (w *watcher) tell(by string) {
	select {
	case w.changed <- by:
	default:
	}
}

func (w *watcher) close() error {
	err := w.events.Close()
	<-w.done
	return err
}
