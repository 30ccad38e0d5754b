package cgroups

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
)

// Pressure is how long tasks waited for a resource (Documentation/accounting/psi.rst): some of them, or all at once.
type Pressure struct {
	Some, Full Stall
}

// Stall is one line of a pressure file.
type Stall struct {
	TotalNanos           uint64  // cumulative; the kernel counts microseconds
	Avg10, Avg60, Avg300 float64 // per cent of the last seconds
}

// pressure reads a pressure file; nil where there is none.
func (r *reader) pressure(dir, file string) *Pressure {
	var p *Pressure
	r.lines(dir, file, func(line []byte) error {
		kind, fields, _ := bytes.Cut(line, []byte(" "))
		var at *Stall
		if p == nil {
			p = &Pressure{}
		}
		switch string(kind) {
		case "some":
			at = &p.Some
		case "full":
			at = &p.Full
		default:
			return nil // of a later kernel
		}
		return at.parse(fields)
	})
	return p
}

// parse reads "avg10=0.00 avg60=0.00 avg300=0.00 total=0".
func (s *Stall) parse(line []byte) error {
	for field := range bytes.FieldsSeq(line) {
		key, value, _ := bytes.Cut(field, []byte("="))
		var err error
		switch string(key) {
		case "avg10":
			s.Avg10, err = strconv.ParseFloat(string(value), 64)
		case "avg60":
			s.Avg60, err = strconv.ParseFloat(string(value), 64)
		case "avg300":
			s.Avg300, err = strconv.ParseFloat(string(value), 64)
		case "total":
			s.TotalNanos, err = strconv.ParseUint(string(value), 10, 64)
			if s.TotalNanos > math.MaxUint64/1000 {
				return fmt.Errorf("%s: out of range", field)
			}
			s.TotalNanos *= 1000
		}
		if err != nil {
			return err
		}
	}
	return nil
}
