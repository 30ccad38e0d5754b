package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/berth-run/berth/images"
)

// pullEvery is how often a pull that lasts is logged: a node whose pods wait for an image must not be silent.
const pullEvery = 10 * time.Second

// watchPulls logs the pulls that last until end is called, which waits for that.
func watchPulls(ctx context.Context, log *slog.Logger, store *images.Store) (end func()) {
	return beside(ctx, func(ctx context.Context) { logPulls(ctx, log, store.Pulls, pullEvery) })
}

// logPulls logs how far the pulls have come that lasted for a whole round, until ctx ends.
func logPulls(ctx context.Context, log *slog.Logger, pulls func() []images.PullStatus, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	before := map[string]int64{} // bytes at the last round, by pull
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := map[string]int64{}
		for _, p := range pulls() {
			key := p.Reference + p.Started.String()
			fetched, total := p.Bytes()
			now[key] = fetched
			last, known := before[key]
			if !known && time.Since(p.Started) < every {
				continue
			}
			here := 0
			for _, l := range p.Layers {
				if l.State.Here() {
					here++
				}
			}
			log.Info("image is being pulled", "image", p.Reference, "state", p.State, "layers", len(p.Layers), "layersHere", here,
				"fetched", fetched, "of", total, "bytesPerSecond", int64(float64(max(fetched-last, 0))/every.Seconds()),
				"since", time.Since(p.Started).Round(time.Second))
		}
		before = now
	}
}
