package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/berth-run/berth/internal/step"
)

// slowStep is how long a step may take before its end is logged as a warning. A pull takes as long as the registry does.
const slowStep = 5 * time.Second

// steps logs the end of every step of a call: where the time of a pod start goes, and what hangs. That a step fails is said
// by the end of its call; that its undo fails nobody else may say.
func steps(log *slog.Logger) func(step.Event) {
	return func(e step.Event) {
		level, what := slog.LevelDebug, "step ends"
		switch {
		case e.Undo && e.Err != nil:
			what = "step could not be undone"
		case e.Undo:
			what = "step is undone"
		}
		if e.Undo && e.Err != nil || e.Duration >= slowStep && e.Call != "PullImage" {
			level = slog.LevelWarn
		}
		attrs := []slog.Attr{
			slog.String("call", e.Call), slog.String("step", e.Step), slog.String("owner", e.Owner), slog.Duration("took", e.Duration),
		}
		if e.Err != nil {
			attrs = append(attrs, slog.Any("error", e.Err))
		}
		log.LogAttrs(context.Background(), level, what, attrs...)
	}
}
