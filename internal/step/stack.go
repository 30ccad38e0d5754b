package step

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// DefaultTimeout is how long a step without a Timeout of its own may take.
const DefaultTimeout = 2 * time.Minute

// leaveBehind is how long a step whose context has ended is waited for before it is left behind.
const leaveBehind = 500 * time.Millisecond

// ErrLeftBehind is in the chain of the error of a step that did not return after its deadline. What it holds is undone
// once it returns.
var ErrLeftBehind = errors.New("has not returned yet")

// Step is one named acquisition.
type Step struct {
	// Name is stable: it stands in records, fail points and logs.
	Name string
	// Timeout bounds Do and Undo, each; zero means [DefaultTimeout].
	Timeout time.Duration
	// Do acquires. It may have failed half way: Undo is called after an error, too.
	Do func(context.Context) error
	// Undo releases, is idempotent and works from recorded facts. Nil where nothing is acquired: such a step is not
	// noted in the journal.
	Undo func(context.Context) error
}

// Event tells the end of a step.
type Event struct {
	Call, Owner, Step string
	Undo              bool
	Start             time.Time
	Duration          time.Duration
	Err               error
}

// Stack is the steps of one call on one owner (a pod, a container, an image), in the order they were begun.
// The zero value works, without a journal.
type Stack struct {
	// Call names the call in fail points, errors and events, such as "RunPodSandbox".
	Call string
	// Owner says whose steps these are: an id.
	Owner string
	// Save, if not nil, keeps the names of the steps begun before they are done, and after they are undone.
	Save func(begun []string) error
	// Observe, if not nil, is told the end of each step.
	Observe func(Event)

	mu    sync.Mutex
	begun []entry
}

type entry struct {
	Step
	pending <-chan struct{} // closed when a Do that was left behind has returned
}

// Resume puts steps that a journal names, oldest first, onto the stack without doing them, so that Unwind undoes them.
func (s *Stack) Resume(steps ...Step) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range steps {
		s.begun = append(s.begun, entry{Step: st})
	}
}

// Begun returns the names of the steps that were begun and not undone, oldest first.
func (s *Stack) Begun() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.names()
}

func (s *Stack) names() []string {
	names := make([]string, len(s.begun))
	for i, e := range s.begun {
		names[i] = e.Name
	}
	return names
}

// Run does the steps one after the other and stops at the first error, which names the step. It undoes nothing. The journal
// is written once, with all of them, before the first is done.
func (s *Stack) Run(ctx context.Context, steps ...Step) error {
	noted, err := s.note(steps...)
	if err != nil {
		return err
	}
	for i, st := range steps {
		if err := s.do(ctx, st); err != nil {
			s.drop(steps[i+1:], noted)
			return err
		}
	}
	return nil
}

// drop takes steps off the stack, of those that were noted, which have not been begun. The journal has them until it is written
// again: to undo them is to undo nothing.
func (s *Stack) drop(steps []Step, noted []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begun = slices.DeleteFunc(s.begun, func(b entry) bool {
		return slices.Contains(noted, b.Name) && slices.ContainsFunc(steps, func(st Step) bool { return st.Name == b.Name })
	})
}

// RunAll does the steps side by side and returns when all have ended. An error of one ends the context of the others.
func (s *Stack) RunAll(ctx context.Context, steps ...Step) error {
	if _, err := s.note(steps...); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(steps))
	var wg sync.WaitGroup
	for i, st := range steps {
		wg.Go(func() {
			if errs[i] = s.do(ctx, st); errs[i] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	// The first cause is what the caller wants to read; the others mostly say that they were cancelled.
	for _, err := range errs {
		if err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
	}
	return errors.Join(errs...)
}

// Unwind undoes all steps begun, last first, even when ctx has ended. A step whose undo fails, or whose Do has not
// returned yet, stays on the stack and in the journal, those below it are undone all the same, and the error names it.
func (s *Stack) Unwind(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	s.mu.Lock()
	todo := slices.Clone(s.begun)
	s.mu.Unlock()
	var errs []error
	for _, e := range slices.Backward(todo) {
		if err := s.undo(ctx, e); err != nil {
			errs = append(errs, err)
			continue
		}
		s.mu.Lock()
		if i := slices.IndexFunc(s.begun, func(b entry) bool { return b.Name == e.Name }); i >= 0 {
			s.begun = slices.Delete(s.begun, i, i+1)
		}
		err := s.save()
		s.mu.Unlock()
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// note puts steps on the stack and into the journal, before they are done. It tells which were not there yet.
func (s *Stack) note(steps ...Step) (noted []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range steps {
		if st.Undo == nil || slices.ContainsFunc(s.begun, func(b entry) bool { return b.Name == st.Name }) {
			continue
		}
		s.begun = append(s.begun, entry{Step: st})
		noted = append(noted, st.Name)
	}
	if len(noted) == 0 {
		return nil, nil
	}
	if err := s.save(); err != nil {
		s.begun = s.begun[:len(s.begun)-len(noted)]
		return nil, err
	}
	return noted, nil
}

func (s *Stack) save() error {
	if s.Save == nil {
		return nil
	}
	if err := s.Save(s.names()); err != nil {
		return fmt.Errorf("%s: note steps of %s: %w", s.Call, s.Owner, err)
	}
	return nil
}

func (s *Stack) do(ctx context.Context, st Step) error {
	pending, err := s.timed(ctx, st, false)
	if pending != nil {
		s.mu.Lock()
		for i := range s.begun {
			if s.begun[i].Name == st.Name {
				s.begun[i].pending = pending
			}
		}
		s.mu.Unlock()
	}
	return err
}

func (s *Stack) undo(ctx context.Context, e entry) error {
	if e.pending != nil {
		select {
		case <-e.pending:
		case <-time.After(leaveBehind):
			return fmt.Errorf("%s: undo %s: the step %w", s.Call, e.Name, ErrLeftBehind)
		}
	}
	_, err := s.timed(ctx, e.Step, true)
	return err
}

// timed runs one half of a step under its deadline. A half that does not return is left behind: pending then tells its
// end.
func (s *Stack) timed(ctx context.Context, st Step, undo bool) (pending <-chan struct{}, err error) {
	run, before, after, verb := st.Do, ".before", ".after", ""
	if undo {
		run, before, after, verb = st.Undo, ".undo-before", ".undo-after", "undo "
	}
	point := s.Call + "." + st.Name
	Point(point + before)
	timeout := st.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s: %w", timeout, context.DeadlineExceeded))
	done, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		defer cancel()
		done <- run(ctx)
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case err = <-done:
		case <-time.After(leaveBehind):
			err = fmt.Errorf("%w: %w", ErrLeftBehind, context.Cause(ctx))
			pending = ended
		}
	}
	if err != nil {
		err = fmt.Errorf("%s%s: %w", verb, st.Name, err)
	}
	if s.Observe != nil {
		s.Observe(Event{Call: s.Call, Owner: s.Owner, Step: st.Name, Undo: undo, Start: start, Duration: time.Since(start), Err: err})
	}
	if err == nil {
		Point(point + after)
	}
	return pending, err
}
