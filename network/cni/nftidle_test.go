package cni

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A connection is kept for its namespace alone, and not if answers may be on their way.
func TestConnectionsAreKept(t *testing.T) {
	var first *nftConn
	open := func() *nftConn {
		c, err := openNFT()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	inNamespace(t, func() error {
		first = open()
		first.close()
		if open() != first {
			t.Error("not kept")
		}
		second := open()
		if second == first {
			t.Error("one connection for two at once")
		}
		second.broken = true
		second.close()
		if third := open(); third == second {
			t.Error("a broken one is kept")
		}
		first.close()
		return nil
	})
	inNamespace(t, func() error {
		c := open()
		defer c.close()
		if c == first {
			t.Error("kept for another namespace")
		}
		ns, err := netnsNumber()
		if err != nil {
			return err
		}
		if ns == first.netns {
			t.Error("the number of a namespace that a connection keeps is given to another")
		}
		_, err = c.get(nftMsg{kind: unix.NFT_MSG_GETTABLE, flags: unix.NLM_F_DUMP})
		return err
	})
}

// Only so many are kept, and what is not is closed.
func TestFewConnectionsAreKept(t *testing.T) {
	inNamespace(t, func() error {
		var all []*nftConn
		for range idleMost + 3 {
			c, err := openNFT()
			if err != nil {
				return err
			}
			all = append(all, c)
		}
		for _, c := range all {
			c.close()
		}
		idleNFT.Lock()
		defer idleNFT.Unlock()
		if n := len(idleNFT.all); n != idleMost {
			t.Errorf("%d are kept, not %d", n, idleMost)
		}
		return nil
	})
}
