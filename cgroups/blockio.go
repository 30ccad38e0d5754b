package cgroups

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// DeviceIO is what was read from and written to a block device, cumulatively.
type DeviceIO struct {
	Major, Minor           uint32
	ReadBytes, WriteBytes  uint64
	Reads, Writes          uint64 // operations
	Discards, DiscardBytes uint64
	SyncBytes, AsyncBytes  uint64 // v1 only: the same bytes as reads and writes, by another division
}

// deviceTable has one entry for each device, in the order in which they come.
type deviceTable []DeviceIO

// at finds or makes the entry of "MAJOR:MINOR".
func (t *deviceTable) at(id string) (*DeviceIO, error) {
	a, b, _ := strings.Cut(id, ":")
	major, err := strconv.ParseUint(a, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", id, err)
	}
	minor, err := strconv.ParseUint(b, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", id, err)
	}
	for i := range *t {
		if d := &(*t)[i]; d.Major == uint32(major) && d.Minor == uint32(minor) {
			return d, nil
		}
	}
	*t = append(*t, DeviceIO{Major: uint32(major), Minor: uint32(minor)})
	return &(*t)[len(*t)-1], nil
}

// line takes one of io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6". A device that has gone, or that only
// has costs, may have no such field.
func (t *deviceTable) line(line []byte) error {
	id, fields, _ := bytes.Cut(line, []byte(" "))
	if len(id) == 0 || !bytes.Contains(id, []byte(":")) {
		return nil
	}
	d, err := t.at(string(id))
	if err != nil {
		return err
	}
	for field := range bytes.FieldsSeq(fields) {
		key, value, _ := bytes.Cut(field, []byte("="))
		var into *uint64
		switch string(key) {
		case "rbytes":
			into = &d.ReadBytes
		case "wbytes":
			into = &d.WriteBytes
		case "rios":
			into = &d.Reads
		case "wios":
			into = &d.Writes
		case "dbytes":
			into = &d.DiscardBytes
		case "dios":
			into = &d.Discards
		default:
			continue
		}
		if *into, err = strconv.ParseUint(string(value), 10, 64); err != nil {
			return fmt.Errorf("%s: %w", field, err)
		}
	}
	return nil
}

// blkioLine takes one of a file of v1: "8:0 Read 1". The last one, "Total 1", is of no device.
func (t *deviceTable) blkioLine(line []byte, field func(*DeviceIO, string) *uint64) error {
	words := strings.Fields(string(line))
	if len(words) != 3 {
		return nil
	}
	d, err := t.at(words[0])
	if err != nil {
		return err
	}
	into := field(d, words[1])
	if into == nil {
		return nil
	}
	*into, err = strconv.ParseUint(words[2], 10, 64)
	return err
}

func blkioBytes(d *DeviceIO, operation string) *uint64 {
	switch operation {
	case "Read":
		return &d.ReadBytes
	case "Write":
		return &d.WriteBytes
	case "Discard":
		return &d.DiscardBytes
	case "Sync":
		return &d.SyncBytes
	case "Async":
		return &d.AsyncBytes
	}
	return nil
}

func blkioOperations(d *DeviceIO, operation string) *uint64 {
	switch operation {
	case "Read":
		return &d.Reads
	case "Write":
		return &d.Writes
	case "Discard":
		return &d.Discards
	}
	return nil
}

// devicesV2 reads io.stat.
func (r *reader) devicesV2(dir string) []DeviceIO {
	var t deviceTable
	r.lines(dir, "io.stat", t.line)
	return t
}

// devicesV1 reads the counters of whichever I/O scheduler keeps some: those of BFQ where it is in use, as cAdvisor prefers
// them, else those of the throttling layer, which are there always.
func (r *reader) devicesV1(dir string) []DeviceIO {
	for _, of := range []string{"blkio.bfq.", "blkio.throttle."} {
		var t deviceTable
		r.lines(dir, of+"io_service_bytes_recursive", func(line []byte) error { return t.blkioLine(line, blkioBytes) })
		r.lines(dir, of+"io_serviced_recursive", func(line []byte) error { return t.blkioLine(line, blkioOperations) })
		if len(t) > 0 {
			return t
		}
	}
	return nil
}

// DeviceName is the name of a block device ("/dev/sda"), "" where there is no such one, as for the device number that a
// file system without one gets.
func DeviceName(major, minor uint32) string {
	target, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if err != nil {
		return ""
	}
	return "/dev/" + filepath.Base(target)
}
