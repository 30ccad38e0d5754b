// Command demo shows berth at work: a stock kubelet runs a pod of three containers on it, the application in it is killed
// and restarted, `berth serve` itself is killed and started again while requests go on, and in the end nothing is left.
//
// It is run by `make demo`, needs root, and uses directories, ports, a bridge and a cgroup of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/berth-run/berth/integration/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	d := &demo{began: time.Now()}
	if err := d.play(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		stop()
		os.Exit(1) //nolint:gocritic // stop was called, and nothing else is deferred
	}
	fmt.Print(`
Next:
  make test                         everything that CI runs, with kubelet, crictl and critest
  examples/pod.yaml                 the pod of this demo
  sudo bin/berth serve --help       a runtime of your own; README.md has five minutes with crictl
  BERTH_KEEP=1 make demo            keeps the logs of berth serve and of the kubelet
`)
}

// demo tells what happens, a line each, with the time since the start and, where it is of interest, how long that took.
type demo struct {
	began time.Time
	node  *lab.Node
}

func (d *demo) say(format string, args ...any) {
	fmt.Printf("%7.2f s  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

// play runs the demo and cleans up, whatever happens.
func (d *demo) play(ctx context.Context) (err error) {
	fmt.Println("berth demo: everything is built once; later runs take about two minutes, one of them waiting for the kubelet's")
	fmt.Println("garbage collection. Ctrl-C ends it and cleans up.")
	tools, err := lab.BuildTools(ctx, os.Stderr, "registry", "cni", "crictl", "kubelet")
	if err != nil {
		return err
	}
	d.began = time.Now()
	d.node, err = lab.New(lab.Options{Tools: tools, Log: d.say, Beside: true})
	if err != nil {
		return err
	}
	if d.node.Foreign() {
		return errors.Join(errors.New("BERTH_TEST_ENDPOINT is set: the demo is about berth"), d.node.Close())
	}
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = errors.New("interrupted")
		} else if err != nil {
			err = fmt.Errorf("%w%s", err, d.evidence())
		}
		if closeErr := d.node.Close(); closeErr != nil {
			err = errors.Join(err, closeErr)
			return
		}
		d.say("cleaned up: kubelet, berth serve, registry, bridge and files are gone")
	}()
	if err := d.start(ctx); err != nil {
		return err
	}
	before, err := d.node.Snapshot()
	if err != nil {
		return err
	}
	p, err := d.runPod(ctx)
	if err != nil {
		return err
	}
	if err := p.companions(ctx); err != nil {
		return err
	}
	if err := p.killApplication(ctx); err != nil {
		return err
	}
	if err := p.killDaemon(ctx); err != nil {
		return err
	}
	return p.remove(ctx, before)
}

// evidence is the end of the logs, for the message of a demo that failed.
func (d *demo) evidence() string {
	var text string
	if p := d.node.Berth; p != nil {
		text += "\n\nThe log of berth serve ends:\n" + p.Tail(12)
	}
	if k := d.node.Kubelet; k != nil {
		text += "\n\nThe last errors of the kubelet:\n" + k.Complaints("")
	}
	return text
}
