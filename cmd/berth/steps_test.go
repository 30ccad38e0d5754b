package main

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/berth-run/berth/cmd/berth/internal/config"
	"github.com/berth-run/berth/internal/step"
)

func TestWhichStepsAreWarnedOf(t *testing.T) {
	failed := errors.New("x")
	for _, tc := range []struct {
		name string
		e    step.Event
		want string
	}{
		{"quick", step.Event{Call: "RunPodSandbox", Step: "network"}, "DEBUG"},
		{"slow", step.Event{Call: "RunPodSandbox", Step: "network", Duration: 6 * time.Second}, "WARN"},
		{"slow registry", step.Event{Call: "PullImage", Step: "fetch", Duration: time.Minute}, "DEBUG"},
		{"failed, as its call says", step.Event{Call: "RunPodSandbox", Step: "network", Err: failed}, "DEBUG"},
		{"undone", step.Event{Call: "RunPodSandbox", Step: "network", Undo: true}, `DEBUG msg="step is undone"`},
		{"not undone", step.Event{Call: "RunPodSandbox", Step: "network", Undo: true, Err: failed}, `WARN msg="step could not be undone"`},
	} {
		var b bytes.Buffer
		steps(slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug})))(tc.e)
		if !strings.Contains(b.String(), "level="+tc.want+" ") || !strings.Contains(b.String(), "step="+tc.e.Step) {
			t.Errorf("%s: %s, want %s", tc.name, b.String(), tc.want)
		}
	}
}

// What goes wrong in one client's session is no error of the daemon.
func TestLibraryErrorsAreNotOurs(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(clients{slog.NewTextHandler(&b, nil)})
	log.Error("Unhandled Error")
	log.With("from", "k8s.io").WithGroup("g").Error("Unhandled Error")
	t.Cleanup(klog.ClearLogger)
	klog.SetSlogLogger(log)
	klog.ErrorS(io.EOF, "Failed to watch")
	klog.FromContext(t.Context()).Error(io.EOF, "Failed to watch")
	klog.Flush()
	if b.Len() > 0 {
		t.Errorf("at level info: %s", b.String())
	}
	log = slog.New(clients{slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug})})
	log.Error("Unhandled Error")
	if !strings.Contains(b.String(), "level=DEBUG") {
		t.Errorf("at level debug: %q", b.String())
	}
}

func TestLoggerHasTheLevelAsked(t *testing.T) {
	t.Cleanup(klog.ClearLogger)
	for level, want := range map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError} {
		for _, format := range []string{"text", "json"} {
			log := logger(&config.Config{LogLevel: level, LogFormat: format})
			if !log.Enabled(t.Context(), want) || log.Enabled(t.Context(), want-1) {
				t.Errorf("%s %s", level, format)
			}
		}
	}
}
