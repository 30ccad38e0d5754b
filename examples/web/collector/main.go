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
	f, err := await(ctx, name)
	if f == nil || err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewReader(f)
	var part string // of a line that is not whole yet
	for {
		text, err := lines.ReadString('\n')
		part += text
		switch {
		case errors.Is(err, io.EOF):
			if !pause(ctx) {
				return nil
			}
			continue
		case err != nil:
			return err
		}
		if _, err := fmt.Fprint(out, "collected: ", part); err != nil {
			return err
		}
		part = ""
	}
}

// await opens a file once it is there; it is nil when the context ends before.
func await(ctx context.Context, name string) (*os.File, error) {
	for {
		f, err := os.Open(name)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		if !pause(ctx) {
			return nil, nil
		}
	}
}

// pause waits a little; it tells whether to go on.
func pause(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(100 * time.Millisecond):
		return true
	}
}
