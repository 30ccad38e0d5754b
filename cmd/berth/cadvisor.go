package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/berth-run/berth/cri"
	"github.com/berth-run/berth/cri/cadvisor"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/internal/socket"
)

// answerCadvisor answers on the socket until end is called, which waits for that. A node without it runs pods as well, and
// shows less of them: what is wrong with the socket is told, and no reason not to serve.
func answerCadvisor(ctx context.Context, log *slog.Logger, path, criSocket string, manager *pods.Manager, store *images.Store) (end func()) {
	if path == "" {
		return func() {}
	}
	l, err := socket.Listen(ctx, path)
	switch {
	case errors.Is(err, socket.ErrInUse):
		log.Info("the socket for cAdvisor is another program's and left to it: metrics of the kubelet have no pod and container labels", "socket", path)
		return func() {}
	case err != nil:
		log.Warn("cAdvisor cannot ask for containers: metrics of the kubelet have no pod and container labels", "error", err)
		return func() {}
	}
	server := cadvisor.New(cadvisor.Options{
		Pods: pods.Born{Manager: manager}, SandboxImage: cri.SandboxImage, CRI: criSocket,
		Image: func(c *pods.Container) string { return cri.ImageLabel(store, c) }, Log: log,
	})
	return beside(ctx, func(ctx context.Context) {
		if err := server.Serve(ctx, l); err != nil {
			log.Warn("cAdvisor can no longer ask for containers", "error", err)
		}
	})
}
