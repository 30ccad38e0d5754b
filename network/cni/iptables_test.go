package cni

import (
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// The sample that an iptables has made is what is made here: of the one that this machine has.
func TestRulesAreThoseOfIPTables(t *testing.T) {
	needRoot(t)
	for _, kind := range []xtKind{{tableNAT, false}, {tableNAT, true}, {tableFilter, false}, {tableFilter, true}} {
		if _, err := identify(kind.program()); err != nil {
			t.Skip(err)
		}
		if err := kind.compareSample(); err != nil {
			t.Errorf("%s, table %s: %v", kind.program(), kind.table, err)
		}
	}
}

// What many find missing at once is added once.
func TestSharedRulesAreAddedOnce(t *testing.T) {
	inNamespace(t, func() error {
		here, err := ns.GetCurrentNS()
		if err != nil {
			return err
		}
		defer here.Close() //nolint:errcheck // opened for reading
		const all, rounds = 4, 100
		var begun, done sync.WaitGroup
		begun.Add(all)
		for range all {
			done.Go(func() {
				if err := inside(here, func() error {
					begun.Done()
					begun.Wait()
					for n := range rounds {
						rule := xtRule{comment: strconv.Itoa(n), target: xtTo{chain: "ACCEPT"}}
						if err := changeXT(tableFilter, false, func(t *xtTable) error { return t.ensureRule("FORWARD", true, rule) }); err != nil {
							return err
						}
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
			})
		}
		done.Wait()
		table, err := openXT(tableFilter, false)
		if err != nil {
			return err
		}
		defer table.close()
		rules, err := table.rules("FORWARD")
		if len(rules) != rounds {
			t.Errorf("%d rules", len(rules))
		}
		return err
	})
}
