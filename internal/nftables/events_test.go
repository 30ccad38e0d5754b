package nftables

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// After an overrun the first change that is told is one that was made afterwards: nothing is lost between.
func TestOverrunEndsWithAnEmptyBuffer(t *testing.T) {
	inNamespace(t, func(c *Conn) error {
		e, err := Watch(0)
		if err != nil {
			return err
		}
		defer e.Close()
		raw, err := e.file.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<10) }); err != nil {
			return err
		}
		var b Batch
		for i := range 2000 {
			addTable(&b, fmt.Sprint(i))
		}
		if err := c.Commit(&b); err != nil {
			return err
		}
		if err := e.Next(func(Event) {}); !errors.Is(err, ErrOverrun) {
			t.Errorf("%v", err)
		}
		addTable(&b, "marker")
		if err := c.Commit(&b); err != nil {
			return err
		}
		var told []Event
		if err := e.Next(func(e Event) { told = append(told, e) }); err != nil || len(told) == 0 || told[0].Table != "marker" {
			t.Errorf("%v, %v", told, err)
		}
		return nil
	})
}

// The changes of the own socket are not told, those of others are, with their end.
func TestOwnChangesAreNotTold(t *testing.T) {
	inNamespace(t, func(c *Conn) error {
		e, err := Watch(c.Port())
		if err != nil {
			return err
		}
		defer e.Close()
		other, err := Open()
		if err != nil {
			return err
		}
		defer other.Close()
		for name, conn := range map[string]*Conn{"own": c, "others": other} {
			var b Batch
			addTable(&b, name)
			if err := conn.Commit(&b); err != nil {
				return err
			}
		}
		ended := false
		for !ended {
			err := e.Next(func(e Event) {
				ended = ended || e.Kind == unix.NFT_MSG_NEWGEN && e.Process != ""
				if e.Table == "own" {
					t.Error("told of its own")
				}
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}
