package nft

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Abilities asks the kernel what it can do. It changes nothing. Where there is no answer, as without the right to ask, all is
// taken for possible: programming says what is wrong then.
func (p *Programmer) Abilities() program.Abilities {
	f := layers[model.IPv4]
	return program.Abilities{
		Hash: p.takes(f, (&rb{f: f}).dnat(f.to().and(hashed(key{f.source()}, 251, 0)), "map")),
	}
}

// takes says whether the kernel would take a rule with a map by the name "map". It is in a transaction that ends with an error.
func (p *Programmer) takes(f layer, r *rb) bool {
	var b nftables.Batch
	o := objects{Batch: &b, table: p.table + "-" + strconv.Itoa(os.Getpid())}
	all := newLayout(f, &params{}).sets
	m := all[endpoints]
	m.name = "map"
	o.addTable(f)
	o.addSet(f, &m)
	o.addChain(f, &chain{name: "dnat", base: &base{"nat", unix.NF_INET_PRE_ROUTING, atDNAT}})
	o.addRule(f, "dnat", &r.r)
	o.deleteChain(f, "none")
	var refused *nftables.RefusedError
	return !errors.As(p.conn.Commit(&b), &refused) || !strings.Contains(refused.What, ": rule of ")
}
