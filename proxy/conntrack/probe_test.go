package conntrack

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/proxy/program"
)

func TestProbeIsASYNWithoutAWindow(t *testing.T) {
	for _, tc := range []struct {
		from, to string
		head     int
	}{{"10.96.0.1:80", "192.0.2.2:40000", 20}, {"[fd96::1]:80", "[fd02::2]:40000", 40}} {
		from, to := netip.MustParseAddrPort(tc.from), netip.MustParseAddrPort(tc.to)
		b := probe(nil, from, to, 0xfffefdfc)
		if len(b) != tc.head+20 {
			t.Fatalf("%d bytes", len(b))
		}
		addresses, tcp := b[tc.head-2*len(from.Addr().AsSlice()):tc.head], b[tc.head:]
		if !bytes.Equal(addresses, append(from.Addr().AsSlice(), to.Addr().AsSlice()...)) {
			t.Errorf("addresses %v", addresses)
		}
		if binary.BigEndian.Uint16(tcp) != 80 || binary.BigEndian.Uint16(tcp[2:]) != 40000 || binary.BigEndian.Uint32(tcp[4:]) != 0xfffefdfc || tcp[13] != 2 || tcp[14] != 0 || tcp[15] != 0 {
			t.Errorf("% x", tcp)
		}
		if sum := checksum(b[tc.head-len(addresses):], 26); sum != 0 { // of a packet with its sum
			t.Errorf("the sum is wrong by %x", sum)
		}
	}
}

// Who has been told is not asked again; the others are, each second while some answer, and else ever more rarely.
func TestWhoHasNotBeenToldIsAskedAgain(t *testing.T) {
	var flows []program.Flow
	still := map[program.Flow]struct{}{}
	for i := range 3 {
		f := program.Flow{Src: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.2"), uint16(i)), Dst: netip.MustParseAddrPort("10.96.0.1:80")}
		flows = append(flows, f)
		still[f] = struct{}{}
	}
	begin := time.Now()
	a := newAsked(flows, begin)
	var times []string
	for again := true; again; {
		now := a.next
		times = append(times, now.Sub(begin).String())
		switch len(times) {
		case 3, 4: // one has answered
			delete(still, flows[len(times)-3])
		}
		again = a.answered(still, now)
	}
	if want := "600ms 1.6s 3.6s 4.6s 5.6s 6.6s 8.6s 12.6s 20.6s 36.6s"; strings.Join(times, " ") != want {
		t.Errorf("%v, want %s", times, want)
	}
	if len(a.flows) != 1 {
		t.Errorf("%v", a.flows)
	}
	if delete(still, flows[2]); a.answered(still, begin) {
		t.Error("nobody is left to be asked")
	}
}

// A proxy that may not send such packets says so once, with what it lacks, and goes on.
func TestProbesWithoutTheRight(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("rights to be given up need root")
	}
	var out bytes.Buffer
	flows := []program.Flow{
		{Src: netip.MustParseAddrPort("192.0.2.2:40000"), Dst: netip.MustParseAddrPort("10.96.0.1:80")},
		{Src: netip.MustParseAddrPort("[fd02::2]:40000"), Dst: netip.MustParseAddrPort("[fd96::1]:80")},
	}
	err := thread.Throwaway(func() error {
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		if err := unix.Capset(&head, &make([]unix.CapUserData, 2)[0]); err != nil {
			return err
		}
		var p probes
		for range 2 {
			p.send(slog.New(slog.NewTextHandler(&out, nil)), flows)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(out.String(), "\n"); lines != 1 || !strings.Contains(out.String(), "CAP_NET_RAW") {
		t.Errorf("%d lines: %s", lines, out.String())
	}
}
