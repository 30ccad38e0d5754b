package network

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// lineError is an error in a line, counted from 1, of a configuration.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string { return e.err.Error() }
func (e *lineError) Unwrap() error { return e.err }

// inLine notes the line of an error; one that is noted already is counted from there. 0 is not known.
func inLine(line int, err error) error {
	var inner *lineError
	switch {
	case line == 0:
		return err
	case errors.As(err, &inner):
		line += inner.line - 1
	}
	return &lineError{line, err}
}

// inFile puts file and line in front of an error, as compilers do. The line is of this file, and of none around it.
func inFile(file string, err error) error {
	var at *lineError
	if errors.As(err, &at) {
		return fmt.Errorf("%s:%d: %v", file, at.line, err)
	}
	return fmt.Errorf("%s: %w", file, err)
}

// lineOf is the line of which an error of encoding/json speaks.
func lineOf(data []byte, err error) int {
	var (
		syntax *json.SyntaxError
		typ    *json.UnmarshalTypeError
	)
	switch {
	case errors.As(err, &syntax):
		return lineAt(data, syntax.Offset)
	case errors.As(err, &typ):
		return lineAt(data, typ.Offset)
	}
	return 0
}

func lineAt(data []byte, offset int64) int {
	return 1 + bytes.Count(data[:min(max(offset, 0), int64(len(data)))], []byte("\n"))
}

// lines are those in which the values of a list begin.
type lines struct {
	keys    map[string]int
	plugins []int
}

func (l lines) key(name string) int { return l.keys[name] }

func (l lines) plugin(i int) int {
	if i < len(l.plugins) {
		return l.plugins[i]
	}
	return 0
}

// linesOf looks through a list, or as much of it as is one.
func linesOf(data []byte) lines {
	l := lines{keys: map[string]int{}}
	d := json.NewDecoder(bytes.NewReader(data))
	value := func() (int, bool) {
		var raw json.RawMessage
		if d.Decode(&raw) != nil {
			return 0, false
		}
		return lineAt(data, d.InputOffset()-int64(len(raw))), true
	}
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return l
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return l
		}
		if key != "plugins" {
			line, ok := value()
			if !ok {
				return l
			}
			name, _ := key.(string)
			l.keys[name] = line
			continue
		}
		l.keys["plugins"] = lineAt(data, d.InputOffset())
		if t, err := d.Token(); err != nil || t != json.Delim('[') {
			return l
		}
		for d.More() {
			line, ok := value()
			if !ok {
				return l
			}
			l.plugins = append(l.plugins, line)
		}
		if _, err := d.Token(); err != nil {
			return l
		}
	}
	return l
}
