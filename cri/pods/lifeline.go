package pods

import (
	"sync"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// lifeline decides which events are told of one container or one sandbox, each once and in the order of a life: created,
// started, stopped, deleted. Its end can be seen before the call that creates or starts it has found out that it
// succeeded; it is told only after that then. What no call has created for anybody is not told at all.
type lifeline struct {
	mu      sync.Mutex
	created bool // told, or known from a record
	starts  bool // a start is under way: what it was, is told at its end
	started bool // told
	ended   bool
	stopped bool // told
	deleted bool // told
	tell    func(...cri.ContainerEventType)
}

// known takes over what an earlier daemon has told. announced is false where it has created nothing for anybody.
func (l *lifeline) known(announced, ended bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.created, l.ended, l.stopped = announced, ended, ended
}

// isCreated notes that the call that creates it succeeds.
func (l *lifeline) isCreated() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.created = true
	l.tell(cri.ContainerEventType_CONTAINER_CREATED_EVENT)
	l.stop()
}

// starting notes that a start begins.
func (l *lifeline) starting() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.starts = true
}

// isStarted notes the end of a start.
func (l *lifeline) isStarted(succeeded bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.starts = false
	if succeeded && l.created && !l.started && !l.stopped && !l.deleted {
		l.started = true
		l.tell(cri.ContainerEventType_CONTAINER_STARTED_EVENT)
	}
	l.stop()
}

// hasEnded notes the end, whose status is on record.
func (l *lifeline) hasEnded() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.stop()
}

// stop tells the end, once its time has come.
func (l *lifeline) stop() {
	if l.created && l.ended && !l.starts && !l.stopped && !l.deleted {
		l.stopped = true
		l.tell(cri.ContainerEventType_CONTAINER_STOPPED_EVENT)
	}
}

// isDeleted notes that it is gone from all lists.
func (l *lifeline) isDeleted() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.created && !l.deleted {
		l.deleted = true
		l.tell(cri.ContainerEventType_CONTAINER_DELETED_EVENT)
	}
}
