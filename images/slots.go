package images

import "context"

// slots bounds how much of something happens at a time. Who waited longest is next.
type slots chan struct{}

func newSlots(n int) slots { return make(slots, n) }

// take waits for a slot, which give gives back.
func (s slots) take(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s slots) give() { <-s }
