package network

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Counters is what has passed a network interface since it was made.
type Counters struct {
	Name string
	Rx   Direction
	Tx   Direction
}

// Direction counts one way.
type Direction struct {
	Bytes, Packets, Errors, Dropped uint64
}

// ReadCounters reads the counters of all interfaces in the network namespace of a process, but for those that carry
// nothing from or to the outside: cAdvisor leaves the same out.
func ReadCounters(pid int) ([]Counters, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/net/dev")
	if err != nil {
		return nil, err
	}
	return parseCounters(data)
}

// columns of /proc/net/dev (net/core/net-procfs.c): eight of what was received, eight of what was sent.
const columns = 16

func parseCounters(data []byte) ([]Counters, error) {
	var all []Counters
	for line := range bytes.Lines(data) {
		// An alias may have a colon in its name; a number has none.
		at := bytes.LastIndexByte(line, ':')
		if at < 0 {
			continue // the heading
		}
		c := Counters{Name: string(bytes.TrimSpace(line[:at]))}
		if internal(c.Name) {
			continue
		}
		fields := strings.Fields(string(line[at+1:]))
		if len(fields) < columns {
			return nil, fmt.Errorf("/proc/net/dev: %d columns of %s, not %d", len(fields), c.Name, columns)
		}
		for i, into := range map[int]*uint64{
			0: &c.Rx.Bytes, 1: &c.Rx.Packets, 2: &c.Rx.Errors, 3: &c.Rx.Dropped,
			8: &c.Tx.Bytes, 9: &c.Tx.Packets, 10: &c.Tx.Errors, 11: &c.Tx.Dropped,
		} {
			v, err := strconv.ParseUint(fields[i], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("/proc/net/dev: %s: %w", c.Name, err)
			}
			*into = v
		}
		all = append(all, c)
	}
	return all, nil
}

func internal(name string) bool {
	for _, prefix := range []string{"lo", "veth", "docker", "nerdctl"} {
		if strings.HasPrefix(strings.ToLower(name), prefix) {
			return true
		}
	}
	return false
}
