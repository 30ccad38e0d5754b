package main

import (
	"context"
	"log/slog"

	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/admin"
	"github.com/berth-run/berth/internal/socket"
)

// answerTools answers `berth images` and its like on the socket until end is called, which waits for that. A node
// without it runs pods as well: what is wrong with the socket is told, and no reason not to serve.
func answerTools(ctx context.Context, log *slog.Logger, path string, store *images.Store) (end func()) {
	l, err := socket.Listen(ctx, path)
	if err != nil {
		log.Warn("berth images and berth registry do not work on this node", "error", err)
		return func() {}
	}
	server := admin.New(admin.Options{Store: store, Log: log})
	return beside(ctx, func(ctx context.Context) {
		if err := server.Serve(ctx, l); err != nil {
			log.Warn("berth images and berth registry no longer work", "error", err)
		}
	})
}

// beside runs f until end is called, which waits for it.
func beside(ctx context.Context, f func(context.Context)) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	return func() { cancel(); <-done }
}
