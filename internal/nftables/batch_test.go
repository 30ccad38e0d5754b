package nftables

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// inNamespace runs a test in a network namespace of its own.
func inNamespace(t *testing.T, f func(c *Conn) error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	err := thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		c, err := Open()
		if err != nil {
			return err
		}
		defer c.Close()
		return f(c)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func addTable(b *Batch, name string) {
	b.Begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, unix.NFPROTO_IPV4, "table "+name)
	b.String(unix.NFTA_TABLE_NAME, name)
	b.End()
}

func tables(c *Conn) (names []string, err error) {
	err = c.Get(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, unix.NFPROTO_IPV4, nil, func(_ byte, attrs []byte) {
		Attrs(attrs, func(kind uint16, content []byte) {
			if kind == unix.NFTA_TABLE_NAME {
				names = append(names, Text(content))
			}
		})
	})
	return names, err
}

func TestCommitIsAllOrNothing(t *testing.T) {
	inNamespace(t, func(c *Conn) error {
		var b Batch
		addTable(&b, "one")
		if err := c.Commit(&b); err != nil || !b.Empty() {
			return fmt.Errorf("%v, empty %v", err, b.Empty())
		}
		for _, name := range []string{"two", "one", "three"} {
			addTable(&b, name)
		}
		err := c.Commit(&b)
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.What != "table one" || !errors.Is(err, unix.EEXIST) {
			t.Errorf("%v", err)
		}
		if names, err := tables(c); err != nil || fmt.Sprint(names) != "[one]" {
			t.Errorf("%v, %v", names, err)
		}
		addTable(&b, "four") // and the connection is as good as before
		return c.Commit(&b)
	})
}

func TestCommitRefusesWhatHasNoRoom(t *testing.T) {
	inNamespace(t, func(c *Conn) error {
		if err := c.SetSendBuffer(64 << 10); err != nil {
			return err
		}
		fill := func(b *Batch) {
			for i := range 3000 {
				addTable(b, fmt.Sprintf("t%d", i))
				if i%3 != 2 {
					b.Glue()
				}
			}
		}
		var b Batch
		fill(&b)
		if err := c.Commit(&b); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%v", err)
		}
		fill(&b)
		parts := b.Split(c.Limit())
		for _, part := range parts {
			if part.Messages()%3 != 0 {
				t.Errorf("a part of %d messages: three belong together", part.Messages())
			}
			if part.Size() > c.Limit() {
				t.Errorf("a part of %d bytes, %d are allowed", part.Size(), c.Limit())
			}
			if err := c.Commit(part); err != nil {
				return err
			}
		}
		if names, err := tables(c); err != nil || len(names) != 3000 || len(parts) < 2 {
			t.Errorf("%d tables by %d parts, %v", len(names), len(parts), err)
		}
		return nil
	})
}

func TestCloseAgainClosesNothing(t *testing.T) {
	inNamespace(t, func(*Conn) error {
		c, err := Open()
		if err != nil {
			return err
		}
		if err := c.Close(); err != nil {
			return err
		}
		other, err := os.Open("/dev/null") // has the number now
		if err != nil {
			return err
		}
		defer other.Close()
		if err := c.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v", err)
		}
		_, err = other.Stat()
		return err
	})
}

func TestGetTellsWhatIsWrong(t *testing.T) {
	inNamespace(t, func(c *Conn) error {
		err := c.Get(unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_IPV4, func(b *Buffer) { b.String(unix.NFTA_TABLE_NAME, "none") }, func(byte, []byte) {})
		if !errors.Is(err, unix.ENOENT) || !strings.HasPrefix(err.Error(), "nf_tables: ") {
			t.Errorf("%v", err)
		}
		return nil
	})
}

// What is cut off or lies about its length is left out, and nothing is read beyond.
func FuzzAttrs(f *testing.F) {
	var b Buffer
	n := b.Open(1)
	b.String(2, "x")
	b.Close(n)
	f.Add(b.Encoded())
	f.Add([]byte{3, 0, 1, 0})
	f.Add([]byte{255, 255, 1, 0, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		total := 0
		Attrs(in, func(_ uint16, content []byte) { total += len(content) })
		RawAttrs(in, func(uint16, bool, []byte) {})
		if total > len(in) {
			t.Errorf("%d bytes of %d", total, len(in))
		}
	})
}
