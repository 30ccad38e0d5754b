package show

import (
	"io"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// Counter shows how many bytes were written to it, on a terminal; elsewhere it shows nothing. It is meant for io.TeeReader
// and io.MultiWriter.
type Counter struct {
	all *mpb.Progress
	bar *mpb.Bar
}

// NewCounter shows on w, if that is a terminal, what has become of so many bytes, of a total where that is not 0.
func NewCounter(w io.Writer, what string, total int64) *Counter {
	if !IsTerminal(w) {
		return &Counter{}
	}
	return newCounter(what, total, mpb.WithOutput(w))
}

func newCounter(what string, total int64, o ...mpb.ContainerOption) *Counter {
	c := &Counter{all: mpb.New(append(o, mpb.WithWidth(40), mpb.WithAutoRefresh())...)}
	decorate := func(counter decor.Decorator) mpb.BarOption {
		return mpb.PrependDecorators(decor.Name(what+" "), counter)
	}
	if total > 0 {
		c.bar = c.all.New(total, mpb.BarStyle(), decorate(decor.CountersKiloByte("% .1f / % .1f")))
	} else {
		c.bar = c.all.New(0, mpb.NopStyle(), decorate(decor.CurrentKiloByte("% .1f")))
	}
	return c
}

// Write implements io.Writer.
func (c *Counter) Write(p []byte) (int, error) {
	if c.bar != nil {
		c.bar.IncrBy(len(p))
	}
	return len(p), nil
}

// End is to be called when nothing more is written.
func (c *Counter) End() {
	if c.bar != nil {
		c.bar.Abort(false)
		c.all.Wait()
	}
}
