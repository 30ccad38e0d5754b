//go:build integration

package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/network"
	"github.com/berth-run/berth/proxy/nft"
)

// TestProxyThroughFaults takes from two proxies what they depend on, and has packets go through what they have made meanwhile: none is
// led elsewhere than before, until it is known that it should be.
func TestProxyThroughFaults(t *testing.T) {
	t.Parallel()
	w := newProxyWorld(t)
	for _, name := range []string{"web", "node-port", "local", "zones"} {
		w.serve(byName(name))
	}
	one, two := w.nodes[0], w.nodes[1]
	t.Run("before its Node is there", func(t *testing.T) {
		w := w.on(t)
		w.delete("/api/v1/nodes/node-2")
		one.start("nftables")
		two.start("nftables")
		w.checkAll(kept)
		// Whose zone is not known goes to all.
		w.checkAll([]promise{{"zones", "b2 node-2", "cluster:80", "a1 b1", "", "tcp"}})
		w.wantHealth(two, http.StatusServiceUnavailable, http.StatusOK)
		two.object()
		w.eventually(promise{"zones", "b2", "cluster:80", "b1", "", "tcp"})
		w.wantHealth(two, http.StatusOK, http.StatusOK)
		w.checkAll(kept)
	})
	t.Run("without an API server", func(t *testing.T) {
		w := w.on(t)
		must(t, w.cp.KillAPIServer())
		w.checkAll(kept)
		// Who starts then knows nothing, and touches nothing.
		must(t, two.proxy.Kill())
		two.launch("--proxy-mode", "nftables")
		two.wantLog("berth proxy starts")
		time.Sleep(2 * time.Second) // and has asked more than once
		w.checkAll(kept)
		must(t, w.cp.StartAPIServer(t.Context()))
		w.move(byName("web"), pods("a2 b2")...)
		w.eventually(promise{"web", "b1 out2", "cluster:80", "a2 b2", "", "tcp"})
		w.move(byName("web"), pods("a1 b1")...)
		w.eventually(promise{"web", "b2 out2", "cluster:80", "a1 b1", "", "tcp"})
		w.checkAll(kept)
	})
	// A cluster whose etcd was lost: revisions begin anew, and there is nothing, no rights either. As long as no list is had, all stays.
	t.Run("an API server that has lost all", func(t *testing.T) {
		w := w.on(t)
		must(t, w.cp.StartEmpty(t.Context()))
		one.wantLog("the proxy needs the rights list and watch")
		w.checkAll(kept)
		// Lists are whole again: what is in none is gone, which is what the API says.
		one.object()
		two.object()
		w.serve(byName("ports"))
		proxyRights(t, w.cp)
		w.eventually(promise{"ports", "a2 b2 out1 out2", "cluster:80", "a1", "", "tcp"})
		w.eventually(promise{"web", "a2 b2 out1 out2", "cluster:80", silence, "", "tcp"})
		for _, name := range []string{"web", "node-port", "local", "zones"} {
			w.serve(byName(name))
		}
		w.eventually(promise{"zones", "a2", "cluster:80", "a1", "", "tcp"}, promise{"zones", "b2", "cluster:80", "b1", "", "tcp"})
		w.checkAll(kept)
	})
	t.Run("a flood of others' changes", func(t *testing.T) {
		w := w.on(t)
		// More than the proxy's socket has room for, and its own table among it.
		var flood strings.Builder
		fmt.Fprintf(&flood, "delete table ip %s\nadd table ip other\nadd set ip other s { type ipv4_addr; }\n", nft.Table)
		for i := range 100000 {
			fmt.Fprintf(&flood, "add element ip other s { 10.%d.%d.%d }\n", i>>16, i>>8&255, i&255)
		}
		w.nft(one, flood.String()+"delete table ip other\n")
		one.wantLog("another program has changed the proxy's tables, which are mended")
		w.eventually(promise{"web", "a2 out1", "cluster:80", "a1 b1", "", "tcp"})
		w.checkAll(kept)
	})
	t.Run("a table that another keeps for itself", func(t *testing.T) {
		w := w.on(t)
		must(t, one.proxy.Stop())
		one.clean()
		owner := w.own(one, nft.Table)
		one.launch("--proxy-mode", "nftables")
		one.wantLog(fmt.Sprintf("nf_tables: table ip %s is owned by the process of netlink port %d, and no other may change it: stop that process", nft.Table, owner.Port()))
		// The other node does without it.
		w.eventually(promise{"web", "b2 out2", "cluster:80", "a1 b1", "", "tcp"})
		must(t, owner.Close()) // and the table with it
		one.wantLog("Services are programmed")
		w.eventually(promise{"web", "a2 out1", "cluster:80", "a1 b1", "", "tcp"})
		w.checkAll(kept)
	})
}

// kept are the promises that are looked at.
var kept = []promise{
	{"web", "a2 b2", "cluster:80", "a1 b1", "own", "tcp udp"},
	{"web", "out1 out2 node-1 node-2", "cluster:80", "a1 b1", "", "tcp udp"},
	{"node-port", "out1 out2", "node-1:port", "a1 b1", "other", "tcp"},
	{"node-port", "out1 out2", "node-2:port", "a1 b1", "other", "tcp"},
	{"local", "out1", "load:80", "a1", "own", "tcp"},
	{"local", "b2", "load:80", "a1", "own", "tcp"},
	{"local", "out2", "load:80", silence, "", "tcp"},
}

func (w *proxyWorld) delete(path string) {
	w.t.Helper()
	_, err := w.cp.Do(w.t.Context(), http.MethodDelete, path, "", nil)
	must(w.t, err)
}

// nft has the program of that name do something on a node.
func (w *proxyWorld) nft(n *worldNode, text string) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "nft")
	must(w.t, os.WriteFile(file, []byte(text), 0o600))
	script(w.t, n.ns, "nft -f "+file)
}

// own makes a table that nobody else may change (NFT_TABLE_F_OWNER), and that ends with the connection.
func (w *proxyWorld) own(n *worldNode, table string) (c *nftables.Conn) {
	w.t.Helper()
	must(w.t, network.InNamespaces([]string{n.ns}, func() (err error) {
		if c, err = nftables.Open(); err != nil {
			return err
		}
		const owner = 2
		var b nftables.Batch
		b.Begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.NFPROTO_IPV4, table)
		b.String(unix.NFTA_TABLE_NAME, table)
		b.Uint32(unix.NFTA_TABLE_FLAGS, owner)
		b.End()
		return c.Commit(&b)
	}))
	return c
}
