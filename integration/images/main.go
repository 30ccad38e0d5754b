// Command images makes the test images of package testimages and pushes them to a registry.
//
//	go run ./integration/images -registry 127.0.0.1:5000 -busybox "$(integration/tools/build.sh busybox | cut -d' ' -f2)"
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/berth-run/berth/integration/testimages"
)

func main() {
	registry := flag.String("registry", "127.0.0.1:5000", "`HOST:PORT` of a registry without TLS")
	busybox := flag.String("busybox", "", "`PATH` of a static busybox (integration/tools/build.sh busybox)")
	app := flag.String("app", "", "`DIR` of the example application, to push its image too")
	layers := flag.Bool("layers", false, "push lab/layers too, several hundred megabytes, to measure pulls")
	flag.Parse()
	if err := push(*registry, *busybox, *app, *layers); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func push(registry, busybox, app string, layers bool) (err error) {
	work, err := os.MkdirTemp("", "berth-images-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	b := testimages.Builder{Registry: registry, Busybox: busybox, Work: work, Log: func(format string, args ...any) {
		fmt.Printf(format+"\n", args...)
	}}
	ctx := context.Background()
	if busybox != "" {
		if err := b.PushAll(ctx); err != nil {
			return err
		}
	}
	if app != "" {
		if err := b.PushApp(ctx, app); err != nil {
			return err
		}
	}
	if layers {
		return b.PushLayers(ctx)
	}
	return nil
}
