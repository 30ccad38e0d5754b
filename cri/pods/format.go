package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
)

// recordVersion is the format that records are written in, recordReader the oldest whose daemons may take them over. Fields may be added
// without a new one. A new version whose records an older daemon gets along with leaves recordReader as it is, so that a node may go back
// to that daemon: it passes over what it does not know, and keeps it. One that must not be passed over raises both.
const (
	recordVersion = 1
	recordReader  = 1
)

// format says of a record who may read it.
type format struct {
	Version int // the latest that has written it
	Reader  int `json:",omitempty"` // the oldest that may take it over; without, that is Version

	later map[string]json.RawMessage // fields of a later version, never changed
}

// stamp is called whenever the record is written.
func (f *format) stamp() {
	f.Version, f.Reader = max(f.Version, recordVersion), max(f.Reader, recordReader)
}

func (f *format) fields() map[string]json.RawMessage { return f.later }

// record is what a file of records has, but for what its maker alone knows.
type record interface {
	stamp()
	fields() map[string]json.RawMessage
}

func encode(rec record) ([]byte, error) {
	rec.stamp()
	data, err := json.Marshal(rec)
	if err != nil || len(rec.fields()) == 0 {
		return data, err
	}
	later, err := json.Marshal(rec.fields())
	if err != nil {
		return nil, err
	}
	return slices.Concat(data[:len(data)-1], []byte(","), later[1:]), nil
}

var errLaterVersion = errors.New("record was written by a later berth: start that one, or remove its pods first")

// decode reads a record into a structure that has format embedded as f. Of a record for later daemons nothing else is read: what is there
// may be of another type.
func decode(data []byte, rec any, f *format) error {
	var head struct{ Version, Reader int }
	if err := json.Unmarshal(data, &head); err != nil {
		return err
	}
	if head.Reader == 0 {
		head.Reader = head.Version
	}
	if head.Reader > recordVersion {
		return fmt.Errorf("format %d, this is format %d: %w", head.Reader, recordVersion, errLaterVersion)
	}
	if err := json.Unmarshal(data, rec); err != nil {
		return err
	}
	f.Reader = head.Reader
	if head.Version <= recordVersion {
		return nil
	}
	if err := json.Unmarshal(data, &f.later); err != nil {
		return err
	}
	for _, known := range reflect.VisibleFields(reflect.TypeOf(rec).Elem()) {
		delete(f.later, known.Name)
	}
	return nil
}
