package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/berth-run/berth/internal/socket"
)

const (
	claimed = "berth-proxy"
	// handover is how long a proxy waits for the one before it, which ends.
	handover   = 10 * time.Second
	claimEvery = 200 * time.Millisecond
)

// ErrClaimed is that another proxy has the namespace.
var ErrClaimed = errors.New("another berth proxy runs in this network namespace")

// Take has the network namespace of the process be this proxy's until it is closed: two would each mend what the other does. It waits
// some seconds for another proxy that may be ending, and for what one that was killed has started and given the name. An error that is not ErrClaimed says nothing of others.
func Take(ctx context.Context, log *slog.Logger) (*socket.Name, error) {
	return take(ctx, claimed, handover, log)
}

// Running is the proxy that has the namespace, in words; empty if there is none.
func Running(ctx context.Context) string { return socket.Holder(ctx, claimed) }

func take(ctx context.Context, name string, wait time.Duration, log *slog.Logger) (*socket.Name, error) {
	for begin, said := time.Now(), false; ; said = true {
		only, err := socket.Only(ctx, name)
		switch {
		case err == nil:
			return only, nil
		case !errors.Is(err, socket.ErrInUse):
			return nil, fmt.Errorf("claim the network namespace: %w", err)
		case time.Since(begin) >= wait:
			return nil, fmt.Errorf("%w (%w): stop that one first", ErrClaimed, err)
		case !said:
			log.Info("another berth proxy runs in this network namespace: it is waited for", "holder", err, "for", wait.String())
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(claimEvery):
		}
	}
}
