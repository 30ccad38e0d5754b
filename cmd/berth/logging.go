package main

import (
	"context"
	"log/slog"
	"os"

	"k8s.io/klog/v2"

	"github.com/berth-run/berth/cmd/berth/internal/config"
)

func logger(c *config.Config) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.LogLevel)) // checked by config
	o := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(os.Stderr, o)
	if c.LogFormat == "json" {
		h = slog.NewJSONHandler(os.Stderr, o)
	}
	klog.SetSlogLogger(slog.New(clients{h}).With("from", "k8s.io"))
	return slog.New(h)
}

// clients is for what k8s.io/cri-streaming logs: what went wrong in one client's session, as "Unhandled Error". That is no
// error of the daemon, and what is, the session has logged itself.
type clients struct{ slog.Handler }

func (c clients) Enabled(ctx context.Context, level slog.Level) bool {
	return c.Handler.Enabled(ctx, min(level, slog.LevelDebug))
}

func (c clients) Handle(ctx context.Context, r slog.Record) error {
	r.Level = min(r.Level, slog.LevelDebug)
	if !c.Handler.Enabled(ctx, r.Level) {
		return nil // klog does not ask before it hands over an error
	}
	return c.Handler.Handle(ctx, r)
}

func (c clients) WithAttrs(attrs []slog.Attr) slog.Handler {
	return clients{c.Handler.WithAttrs(attrs)}
}

func (c clients) WithGroup(name string) slog.Handler { return clients{c.Handler.WithGroup(name)} }
