// Command collector follows a log file that another container of its pod writes, and prints its lines.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	file := flag.String("file", "/var/log/web/access.log", "`FILE` to follow")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := follow(ctx, *file, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// follow copies the lines of a file as they are written, until the context ends. The file need not be there yet.
func follow(ctx context.Context, name string, out io.Writer) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var lines *bufio.Reader
	var part string // of a line that is not whole yet
	for {
		if lines == nil {
			f, err := os.Open(name)
			switch {
			case err == nil:
				defer func() { _ = f.Close() }()
				lines = bufio.NewReader(f)
			case !errors.Is(err, fs.ErrNotExist):
				return err
			}
		}
		for lines != nil {
			text, err := lines.ReadString('\n')
			part += text
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			if _, err := fmt.Fprint(out, "collected: ", part); err != nil {
				return err
			}
			part = ""
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
