package images

import (
	"context"
	"io"
	"sync"
)

// pipeline runs the stages of one layer side by side: one fetches and hashes what comes, one decompresses, one hashes the
// archive, and whoever reads the last one makes files of it. So a single large layer uses several cores, and each stage
// may run ahead of the next by a few blocks. Blocks are used again, in this layer and in the next.
type pipeline struct {
	ctx    context.Context
	cancel context.CancelFunc
	stages sync.WaitGroup
	all    []*stage
}

const (
	blockSize   = 256 << 10
	aheadBlocks = 4 // that a stage may be ahead of the next
)

var blocks = sync.Pool{New: func() any { return new([blockSize]byte) }}

func newPipeline(ctx context.Context) *pipeline {
	p := &pipeline{}
	p.ctx, p.cancel = context.WithCancel(ctx)
	return p
}

// end makes the stages stop and waits for them; first must make what the first stage reads from return.
func (p *pipeline) end(first io.Reader) {
	p.cancel()
	if c, ok := first.(io.Closer); ok {
		c.Close()
	}
	p.stages.Wait()
	for _, s := range p.all {
		s.giveBack()
	}
}

// stage reads what another goroutine makes ready. Its error is told after all that came before it.
type stage struct {
	ctx   context.Context
	full  chan block
	free  chan *[blockSize]byte
	block block // being read
	at    int
	err   error // of the stage before, set before full is closed
	ended bool
	told  error // what its reader is told then
}

type block struct {
	mem *[blockSize]byte
	n   int
}

// ahead has r read in a goroutine of its own.
func (p *pipeline) ahead(r io.Reader) *stage {
	s := &stage{ctx: p.ctx, full: make(chan block, aheadBlocks), free: make(chan *[blockSize]byte, aheadBlocks)}
	p.all = append(p.all, s)
	p.stages.Go(func() {
		defer close(s.full)
		for made := 0; ; made++ {
			var mem *[blockSize]byte
			if made < aheadBlocks {
				mem = blocks.Get().(*[blockSize]byte)
			} else {
				select {
				case mem = <-s.free:
				case <-p.ctx.Done():
					s.err = context.Cause(p.ctx)
					return
				}
			}
			n, err := readBlock(r, mem[:])
			if n > 0 {
				s.full <- block{mem, n} // there is room for all there are
			} else {
				blocks.Put(mem)
			}
			if err != nil {
				s.err = err
				return
			}
		}
	})
	return s
}

// readBlock fills a good part of a block, or what there is at the end.
func readBlock(r io.Reader, p []byte) (n int, err error) {
	for n < len(p)/2 && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}

// through has f see each block before it is read, in a goroutine of its own.
func (p *pipeline) through(in *stage, f func([]byte)) *stage {
	out := &stage{ctx: p.ctx, full: make(chan block, aheadBlocks), free: in.free}
	p.all = append(p.all, out)
	p.stages.Go(func() {
		defer close(out.full)
		for b := range in.full {
			f(b.mem[:b.n])
			out.full <- b
		}
		out.err = in.err
	})
	return out
}

// Read implements io.Reader.
func (s *stage) Read(p []byte) (int, error) {
	if s.at == s.block.n && !s.next() {
		return 0, s.told
	}
	n := copy(p, s.block.mem[s.at:s.block.n])
	s.at += n
	return n, nil
}

// next gives the block that was read back and takes another.
func (s *stage) next() bool {
	if s.ended {
		return false
	}
	if s.block.mem != nil {
		s.free <- s.block.mem
	}
	s.block, s.at = block{}, 0
	select {
	case b, ok := <-s.full:
		s.block = b
		if s.ended = !ok; s.ended {
			s.told = s.err
		}
	case <-s.ctx.Done():
		s.ended = true
		s.told = context.Cause(s.ctx)
	}
	return !s.ended
}

// giveBack keeps the blocks for other layers, when nobody is at them any more.
func (s *stage) giveBack() {
	if s.block.mem != nil {
		blocks.Put(s.block.mem)
	}
	for b := range s.full { // closed by now
		blocks.Put(b.mem)
	}
	for {
		select {
		case mem := <-s.free:
			blocks.Put(mem)
		default:
			return
		}
	}
}
