package streaming

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

func dataFrame(stream uint32, flags byte, payload []byte) []byte {
	f := binary.BigEndian.AppendUint32(nil, stream)
	f = binary.BigEndian.AppendUint32(f, uint32(len(payload)))
	f[4] = flags
	return append(f, payload...)
}

func controlFrame(kind uint16, payload []byte) []byte {
	f := binary.BigEndian.AppendUint16(nil, 0x8003)
	f = binary.BigEndian.AppendUint16(f, kind)
	f = binary.BigEndian.AppendUint32(f, uint32(len(payload)))
	return append(f, payload...)
}

// frames reads what a guard gives out: the data of each stream, the number of frames and the longest, and the streams that
// ended.
type frames struct {
	data     map[uint32][]byte
	fin      map[uint32]int
	longest  int
	controls [][]byte
}

func readFrames(r io.Reader) (frames, error) {
	f := frames{data: map[uint32][]byte{}, fin: map[uint32]int{}}
	for {
		head := make([]byte, frameHead)
		if _, err := io.ReadFull(r, head); err != nil {
			return f, err
		}
		length := int(binary.BigEndian.Uint32(head[4:]) & 0xffffff)
		payload := make([]byte, length)
		if _, err := io.ReadFull(r, payload); err != nil {
			return f, err
		}
		f.longest = max(f.longest, length)
		if head[0]&0x80 != 0 {
			f.controls = append(f.controls, append(head, payload...))
			continue
		}
		stream := binary.BigEndian.Uint32(head)
		f.data[stream] = append(f.data[stream], payload...)
		if head[4]&flagFin != 0 {
			f.fin[stream]++
		}
	}
}

func TestGuardCutsLongFrames(t *testing.T) {
	long := bytes.Repeat([]byte("0123456789abcdef"), 100_000) // 1.6 MB
	open := controlFrame(synStream, []byte("headers"))
	in := bytes.Join([][]byte{open, dataFrame(1, 0, []byte("short")), dataFrame(1, flagFin, long), dataFrame(3, flagFin, nil)}, nil)
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(in), "by bytes": iotest.OneByteReader(bytes.NewReader(in))} {
		got, err := readFrames(newGuard(r, 1))
		if !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
		if want := append([]byte("short"), long...); !bytes.Equal(got.data[1], want) {
			t.Errorf("%s: %d bytes of %d", name, len(got.data[1]), len(want))
		}
		if got.fin[1] != 1 || got.fin[3] != 1 || got.longest > maxData {
			t.Errorf("%s: ends %v, longest frame %d", name, got.fin, got.longest)
		}
		if len(got.controls) != 1 || !bytes.Equal(got.controls[0], open) {
			t.Errorf("%s: control frames %q", name, got.controls)
		}
	}
}

func TestGuardEndsConnectionsOutOfBounds(t *testing.T) {
	for name, in := range map[string][]byte{
		"a long control frame": controlFrame(4, make([]byte, maxControl+1)),
		"many streams":         bytes.Repeat(controlFrame(synStream, nil), 4),
	} {
		if _, err := readFrames(newGuard(bytes.NewReader(in), 3)); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := readFrames(newGuard(bytes.NewReader(bytes.Repeat(controlFrame(synStream, nil), 1000)), -1)); !errors.Is(err, io.EOF) {
		t.Errorf("any number of streams: %v", err)
	}
}

func TestGuardTellsOfStreamsGivenUp(t *testing.T) {
	in := append(dataFrame(5, 0, []byte("x")), controlFrame(rstStream, []byte{0, 0, 0, 5, 0, 0, 0, 5})...)
	g := newGuard(iotest.OneByteReader(bytes.NewReader(in)), -1)
	var told []uint32
	g.reset = func(stream uint32) { told = append(told, stream) }
	got, err := readFrames(g)
	if !errors.Is(err, io.EOF) || len(got.controls) != 1 || len(told) != 1 || told[0] != 5 {
		t.Errorf("told of %v, %d control frames, %v", told, len(got.controls), err)
	}
}

// What a guard gives out says the same as what it was given, up to where it ends the connection.
func FuzzGuard(f *testing.F) {
	f.Add(bytes.Join([][]byte{controlFrame(synStream, []byte("x")), dataFrame(1, flagFin, []byte("hello"))}, nil))
	f.Add(dataFrame(7, 0xff, bytes.Repeat([]byte{1}, 100)))
	f.Add([]byte{0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		want, _ := readFrames(bytes.NewReader(in))
		got, err := readFrames(newGuard(bytes.NewReader(in), 3))
		if got.longest > maxData {
			t.Errorf("a frame of %d bytes", got.longest)
		}
		if errors.Is(err, errFrame) {
			return
		}
		for stream, data := range want.data {
			if !bytes.HasPrefix(got.data[stream], data) {
				t.Errorf("stream %d: %q became %q", stream, data, got.data[stream])
			}
		}
		if len(got.controls) != len(want.controls) {
			t.Errorf("%d control frames became %d", len(want.controls), len(got.controls))
		}
	})
}
