package show

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/admin"
)

// Progress shows how far one pull has come. It is used by one goroutine.
type Progress interface {
	Update(*admin.Pull)
	// End is the end of the pull, however it ended: nothing more is written then.
	End()
}

// NewProgress shows it as bars where w is a terminal, and as lines elsewhere.
func NewProgress(w io.Writer) Progress {
	if IsTerminal(w) {
		return newBars(mpb.WithOutput(w))
	}
	return &lines{w: w, layers: map[int]images.LayerState{}}
}

// IsTerminal tells whether w is a terminal, and one that can move its cursor.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// lines tell when a layer has come, and every ten seconds how far all has.
type lines struct {
	w      io.Writer
	state  images.PullState
	layers map[int]images.LayerState
	said   time.Time
}

const lineEvery = 10 * time.Second

// Update implements Progress.
func (l *lines) Update(p *admin.Pull) {
	if p.State != l.state {
		l.state = p.State
		l.tell(p, string(p.State))
	}
	for i, layer := range p.Layers {
		if l.layers[i] == layer.State {
			continue
		}
		l.layers[i] = layer.State
		if layer.State.Here() {
			l.tell(p, fmt.Sprintf("layer %d of %d (%s): %s, %s", i+1, len(p.Layers), short(layer.Digest), layer.State, Size(layer.Size, false)))
		}
	}
	if time.Since(l.said) >= lineEvery {
		l.tell(p, fmt.Sprintf("%s of %s", Size(p.Fetched, false), Size(p.Total, false)))
	}
}

func (l *lines) tell(p *admin.Pull, what string) {
	l.said = time.Now()
	fmt.Fprintf(l.w, "%s: %s\n", Plain(p.Reference), what)
}

// End implements Progress.
func (l *lines) End() {}

func short(d digest.Digest) string {
	if hex := d.Encoded(); len(hex) > 12 {
		return hex[:12]
	}
	return d.String()
}

// bars are one for each layer, below a line for the pull.
type bars struct {
	all    *mpb.Progress
	title  *mpb.Bar
	state  atomic.Value // string
	layers []*layerBar
}

type layerBar struct {
	*mpb.Bar
	state atomic.Value // images.LayerState
}

func newBars(o ...mpb.ContainerOption) *bars {
	b := &bars{all: mpb.New(append(o, mpb.WithWidth(40), mpb.WithAutoRefresh())...)}
	b.state.Store("")
	b.title = b.all.New(0, mpb.NopStyle(), mpb.PrependDecorators(decor.Any(func(decor.Statistics) string { return b.state.Load().(string) })))
	return b
}

// Update implements Progress.
func (b *bars) Update(p *admin.Pull) {
	b.state.Store(Plain(p.Reference) + ": " + string(p.State))
	for i, layer := range p.Layers {
		if i == len(b.layers) {
			b.layers = append(b.layers, b.layer(layer))
		}
		bar := b.layers[i]
		bar.state.Store(layer.State)
		switch layer.State {
		case images.LayerUnpacked, images.LayerPresent:
			bar.SetTotal(layer.Size, false)
			bar.SetCurrent(layer.Size)
			bar.SetTotal(-1, true)
		default: // that all has been fetched is not the end: it is being unpacked
			bar.SetTotal(layer.Size, false)
			bar.SetCurrent(layer.Fetched)
		}
	}
}

func (b *bars) layer(l admin.PullLayer) *layerBar {
	bar := &layerBar{}
	bar.state.Store(l.State)
	bar.Bar = b.all.AddBar(0, // so that it is we who say when it is complete
		mpb.PrependDecorators(
			decor.Name(short(l.Digest)+" "),
			decor.Any(func(decor.Statistics) string { return string(bar.state.Load().(images.LayerState)) }, decor.WC{W: 9, C: decor.DindentRight}),
		),
		mpb.AppendDecorators(decor.CountersKiloByte("% .1f / % .1f")))
	return bar
}

// End implements Progress.
func (b *bars) End() {
	for _, bar := range b.layers {
		bar.Abort(false) // what is complete stays so
	}
	b.title.Abort(true)
	b.all.Wait()
}
