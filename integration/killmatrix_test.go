//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/internal/step"
)

// leastPoints is how many fail points of the daemon the matrix must have, so that it does not shrink unseen.
const leastPoints = 150

// killWorkers is how many nodes work through the matrix side by side: more than there are processors, since a good part
// of it is waiting.
const killWorkers = 3

// TestKillMatrix kills the daemon before and after every named step of every call, in turn, starts it again, and has the
// client repeat the call and go on. Nothing may stop, be lost, be blocked or be left behind. The points are those that a
// life without a kill passes, so that a new step is in the matrix by itself.
func TestKillMatrix(t *testing.T) {
	ctx := t.Context()
	all := livePoints(ctx, t)
	if len(all) < leastPoints {
		t.Fatalf("%d fail points, at least %d are expected: %v", len(all), leastPoints, all)
	}
	t.Logf("%d points of the daemon", len(all))
	var (
		mu       sync.Mutex
		recovery = map[string]string{} // point passed in a recovery: the kill before it
	)
	began := time.Now()
	t.Run("calls", func(t *testing.T) {
		matrix(t, all, func(k *killNode, point string) error {
			passed, err := k.killAt(ctx, point, "")
			mu.Lock()
			defer mu.Unlock()
			for _, p := range passed {
				if recovery[p] == "" {
					recovery[p] = point
				}
			}
			return err
		})
	})
	t.Logf("%d points of calls in %v", len(all), time.Since(began).Round(time.Second))
	if t.Failed() {
		return
	}
	// A daemon that is killed while it recovers has to recover from that.
	began = time.Now()
	var again []string
	for p := range recovery {
		again = append(again, p)
	}
	sort.Strings(again)
	t.Run("recovery", func(t *testing.T) {
		matrix(t, again, func(k *killNode, point string) error {
			_, err := k.killAt(ctx, recovery[point], point)
			return err
		})
	})
	t.Logf("%d points of recovery in %v", len(again), time.Since(began).Round(time.Second))
}

// livePoints runs a life without a kill, which must leave nothing, and returns the points that it passes.
func livePoints(ctx context.Context, t *testing.T, prepare ...func(*lab.Node) error) []string {
	t.Helper()
	k, err := newKillNode(ctx, t, prepare...)
	must(t, err)
	defer func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}()
	if k.Foreign() {
		t.Skip("another runtime has no fail points")
	}
	list := filepath.Join(k.Dir, "points")
	must(t, k.KillBerth())
	must(t, k.StartBerth(ctx, listTo(step.EnvList, list)))
	began := time.Now()
	_, err = newLife(k.Node, false).run(ctx, 0)
	must(t, err)
	t.Logf("a life takes %v", time.Since(began).Round(time.Millisecond))
	must(t, k.settle(ctx))
	must(t, k.unharmed(ctx))
	passed, err := points(list)
	must(t, err)
	return passed
}

// matrix runs a case for each point, on a few nodes side by side. A node on which a case failed is not used again.
func matrix(t *testing.T, points []string, test func(k *killNode, point string) error, prepare ...func(*lab.Node) error) {
	todo := make(chan string, len(points))
	for _, p := range points {
		todo <- p
	}
	close(todo)
	for w := range min(killWorkers, len(points)) {
		t.Run(fmt.Sprint("node ", w+1), func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			var k *killNode
			done := func() {
				if k == nil {
					return
				}
				if err := k.Close(); err != nil {
					t.Error(err)
				}
				k = nil
			}
			defer func() { done() }()
			for point := range todo {
				if k == nil {
					var err error
					if k, err = newKillNode(ctx, t, prepare...); err != nil {
						t.Fatal(err)
					}
				}
				t.Run(point, func(t *testing.T) {
					if err := test(k, point); err != nil {
						t.Errorf("%v\nfrom the log of berth serve:\n%s", err, k.said())
					}
				})
				if t.Failed() {
					_ = k.Close() // what the case left behind was its failure
					k = nil
				}
			}
		})
	}
}

// killAt runs a life in which the daemon dies at a point, and, if recovery is not empty, again at that point while it
// recovers. It returns the points that the last recovery passed.
func (k *killNode) killAt(ctx context.Context, point, recovery string) (passed []string, err error) {
	l := newLife(k.Node, false)
	leaver, err := k.newLeaver(ctx)
	if err != nil {
		return nil, err
	}
	if err := k.KillBerth(); err != nil {
		return nil, err
	}
	if err := k.StartBerth(ctx, step.EnvKill+"="+point); err != nil {
		return nil, err
	}
	at, err := l.run(ctx, 0)
	if err == nil {
		return nil, errors.New("this life did not pass the point")
	}
	if !k.died(5 * time.Second) {
		return nil, err
	}
	interrupted := l.acts[at]
	fail := func(when string, err error) error {
		return fmt.Errorf("daemon killed in %q: %s: %w", interrupted.name, when, err)
	}
	if err := leaver.leave(ctx); err != nil {
		return nil, err
	}
	if recovery != "" {
		// It may be ready before it passes the point: what takes time is recovered in the background.
		err := k.StartBerth(ctx, step.EnvKill+"="+recovery)
		if !k.died(10 * time.Second) {
			return nil, fail("restart", errors.Join(errors.New("this recovery did not pass the point"), err))
		}
	}
	list := filepath.Join(k.Dir, "points")
	if err := os.RemoveAll(list); err != nil {
		return nil, err
	}
	if err := k.StartBerth(ctx, listTo(step.EnvList, list)); err != nil {
		return nil, fail("restart", err)
	}
	if err := errors.Join(k.left(ctx, leaver), k.unharmed(ctx), l.check(ctx, interrupted.about)); err != nil {
		return passed, fail("after the restart", err)
	}
	if _, err := l.run(ctx, at); err != nil {
		return passed, fail("repeated", err)
	}
	if err := errors.Join(k.settle(ctx), k.unharmed(ctx)); err != nil {
		return passed, fail("at the end", err)
	}
	all, err := points(list)
	for _, p := range all {
		if strings.HasPrefix(p, "Recover.") {
			passed = append(passed, p)
		}
	}
	return passed, err
}
