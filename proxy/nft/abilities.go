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
		Hash:   p.takes(f, endpoints, (&rb{f: f}).dnat(f.to().and(hashed(key{f.source()}, 251, 0)), "map")),
		Ranges: p.takes(f, rangeGroups, (&rb{f: f}).setPriority(f.to(), "map")),
		Resets: p.canReset(),
	}
}

// Supported says why the kernel cannot do what this package needs; nil if it can, or does not say. It changes nothing.
func (p *Programmer) Supported() error {
	for _, f := range layers {
		var b nftables.Batch
		o := objects{Batch: &b, table: p.table + "-" + strconv.Itoa(os.Getpid())}
		o.addTable(f)
		o.change(&layout{}, newLayout(f, &params{}))
		if b.Size() > p.conn.Limit() {
			return nil
		}
		o.deleteChain(f, "none") // the transaction ends with an error
		err := p.conn.Commit(&b)
		var refused *nftables.RefusedError
		if errors.As(err, &refused) && strings.Contains(refused.What, " none") || errors.Is(err, unix.EPERM) {
			continue
		}
		if err != nil {
			return explain(err)
		}
	}
	return nil
}

// takes says whether the kernel would take a rule with a map like that one by the name "map". It is in a transaction that ends with an error.
func (p *Programmer) takes(f layer, like setID, r *rb) bool {
	var b nftables.Batch
	o := objects{Batch: &b, table: p.table + "-" + strconv.Itoa(os.Getpid())}
	all := newLayout(f, &params{}).sets
	m := all[like]
	m.name = "map"
	o.addTable(f)
	o.addSet(f, &m)
	o.addChain(f, &chain{name: "dnat", base: &base{"nat", unix.NF_INET_PRE_ROUTING, atDNAT}})
	o.addRule(f, "dnat", &r.r)
	o.deleteChain(f, "none")
	var refused *nftables.RefusedError
	return !errors.As(p.conn.Commit(&b), &refused) || !strings.Contains(refused.What, ": rule of ") && !strings.Contains(refused.What, ": set ")
}
