package config

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	yamlnode "go.yaml.in/yaml/v3"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"

	"github.com/berth-run/berth/internal/spell"
)

// maxFile bounds a configuration file: no object of the API server is larger.
const maxFile = 1 << 20

// maxErrors is how many mistakes of a file are told.
const maxErrors = 20

const kind = "KubeProxyConfiguration"

// lines are where the fields of a file are, by path.
type lines map[string]int

// readFile reads a file: its values, and where they are.
func readFile(file string) (*v1alpha1.KubeProxyConfiguration, lines, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, fmt.Errorf("configuration file: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(data) > maxFile {
		return nil, nil, fmt.Errorf("%s: more than %d bytes", file, maxFile)
	}
	return parse(file, data)
}

// parse reads strictly: the tree of the file is walked beside the type, so that each mistake has its line.
func parse(file string, data []byte) (*v1alpha1.KubeProxyConfiguration, lines, error) {
	dec := yamlnode.NewDecoder(bytes.NewReader(data))
	var doc, more yamlnode.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%s: is empty", file)
	} else if err != nil {
		return nil, nil, syntax(file, err)
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%s:%d: there is more than one document", file, max(more.Line, 1))
	}
	r := reader{file: file, lines: lines{}}
	c := &v1alpha1.KubeProxyConfiguration{}
	root := doc.Content[0]
	if err := r.checkKind(root); err != nil {
		return nil, nil, err
	}
	r.read(root, "", reflect.ValueOf(c).Elem())
	return c, r.lines, errors.Join(r.errs...)
}

// syntax is what is no YAML, as a place and a reason.
func syntax(file string, err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		return fmt.Errorf("%s:%s", file, rest)
	}
	return fmt.Errorf("%s: %s", file, text)
}

// reader walks a file.
type reader struct {
	file  string
	lines lines
	errs  []error
}

func (r *reader) fail(n *yamlnode.Node, path, format string, args ...any) {
	switch {
	case len(r.errs) > maxErrors:
		return
	case len(r.errs) == maxErrors:
		r.errs = append(r.errs, fmt.Errorf("%s: there is more that is wrong with it", r.file))
		return
	}
	if path != "" {
		path += ": "
	}
	r.errs = append(r.errs, fmt.Errorf("%s:%d: %s%s", r.file, n.Line, path, fmt.Sprintf(format, args...)))
}

// checkKind is before all else: the fields of another kind would all be unknown.
func (r *reader) checkKind(root *yamlnode.Node) error {
	if root.Kind != yamlnode.MappingNode {
		return fmt.Errorf("%s:%d: is a %s and not a mapping", r.file, root.Line, shape(root))
	}
	for _, want := range [][2]string{{"kind", kind}, {"apiVersion", v1alpha1.SchemeGroupVersion.String()}} {
		i := slices.IndexFunc(root.Content, func(n *yamlnode.Node) bool { return n.Value == want[0] })
		if i < 0 || i%2 != 0 {
			return fmt.Errorf("%s:%d: there is no %s: %s", r.file, root.Line, want[0], want[1])
		}
		if n := root.Content[i+1]; n.Value != want[1] {
			hint := ""
			if n.Value == "ConfigMap" {
				hint = " (the configuration is what its config.conf holds)"
			}
			return fmt.Errorf("%s:%d: %s: is %q and not %q%s", r.file, n.Line, want[0], shorten(n.Value), want[1], hint)
		}
	}
	return nil
}

// read has a value be what a node says. What is null leaves it as it is.
func (r *reader) read(n *yamlnode.Node, path string, v reflect.Value) {
	if n.Kind == yamlnode.AliasNode {
		n = n.Alias
	}
	if n.Kind == yamlnode.ScalarNode && n.ShortTag() == "!!null" {
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	switch {
	case isLeaf(v.Type()):
		r.scalar(n, path, v)
	case v.Kind() == reflect.Struct:
		r.mapping(n, path, func(key *yamlnode.Node, at string, value *yamlnode.Node) {
			known := map[string]reflect.Value{}
			fields(v, known)
			field, ok := known[key.Value]
			if !ok {
				r.fail(key, "", "unknown field %q, the nearest known is %q", shorten(at), join(path, spell.Nearest(key.Value, names(known))))
				return
			}
			r.read(value, at, field)
		})
	case v.Kind() == reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		r.mapping(n, path, func(key *yamlnode.Node, at string, value *yamlnode.Node) {
			item := reflect.New(v.Type().Elem()).Elem()
			r.read(value, at, item)
			v.SetMapIndex(reflect.ValueOf(key.Value), item)
		})
	case v.Kind() == reflect.Slice:
		if n.Kind != yamlnode.SequenceNode {
			r.fail(n, path, "a %s cannot be a list", shape(n))
			return
		}
		for i, item := range n.Content {
			at := path + "[" + strconv.Itoa(i) + "]"
			r.lines[at] = item.Line
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
			r.read(item, at, v.Index(i))
		}
	}
}

// mapping calls a function for each key.
func (r *reader) mapping(n *yamlnode.Node, path string, each func(key *yamlnode.Node, path string, value *yamlnode.Node)) {
	if n.Kind != yamlnode.MappingNode {
		r.fail(n, path, "a %s cannot be a mapping", shape(n))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		if key.Kind != yamlnode.ScalarNode {
			r.fail(key, path, "a %s cannot be a name", shape(key))
			continue
		}
		if first, ok := seen[key.Value]; ok {
			r.fail(key, "", "%q is there already, at line %d", shorten(at), first)
			continue
		}
		seen[key.Value] = key.Line
		r.lines[at] = key.Line
		each(key, at, value)
	}
}

// scalar has the type itself read a value, as it would from JSON.
func (r *reader) scalar(n *yamlnode.Node, path string, v reflect.Value) {
	if n.Kind != yamlnode.ScalarNode {
		r.fail(n, path, "a %s cannot be a %s", shape(n), wanted(v.Type()))
		return
	}
	text, err := asJSON(n)
	if err == nil {
		err = json.Unmarshal(text, v.Addr().Interface())
	}
	if t := (*json.UnmarshalTypeError)(nil); errors.As(err, &t) {
		r.fail(n, path, "%q is a %s and not a %s", shorten(n.Value), t.Value, wanted(v.Type()))
	} else if err != nil {
		r.fail(n, path, "%q: %v", shorten(n.Value), err)
	}
}

// asJSON is the value of a scalar. What is plain is a number, a truth value or a string by YAML 1.1, as Kubernetes reads it.
func asJSON(n *yamlnode.Node) (json.RawMessage, error) {
	if n.Style&yamlnode.TaggedStyle != 0 {
		return nil, fmt.Errorf("tags such as %s are not known here", shorten(n.Tag))
	}
	if n.Style != 0 || strings.ContainsAny(n.Value, "\n\r\u0085\u2028\u2029") {
		return json.Marshal(n.Value)
	}
	text, err := yaml.YAMLToJSON([]byte("v: " + n.Value))
	if err != nil {
		return nil, errors.New("cannot be read")
	}
	var out struct {
		V json.RawMessage `json:"v"`
	}
	err = json.Unmarshal(text, &out)
	return out.V, err
}

var (
	jsonReader = reflect.TypeFor[json.Unmarshaler]()
	textReader = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// isLeaf is whether a type is read from a scalar: all that is no struct, map or list, or reads itself.
func isLeaf(t reflect.Type) bool {
	if p := reflect.PointerTo(t); p.Implements(jsonReader) || p.Implements(textReader) {
		return true
	}
	switch t.Kind() {
	case reflect.Struct, reflect.Map, reflect.Slice, reflect.Pointer:
		return false
	}
	return true
}

// fields are those of a struct by their names in a file, those of structs that are inlined included.
func fields(v reflect.Value, out map[string]reflect.Value) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name != "" && name != "-":
			out[name] = v.Field(i)
		case f.Anonymous && f.Type.Kind() == reflect.Struct:
			fields(v.Field(i), out)
		}
	}
}

func names(m map[string]reflect.Value) []string {
	out := make([]string, 0, len(m))
	for name := range m {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// wanted says in YAML's words what a type takes.
func wanted(t reflect.Type) string {
	switch {
	case strings.Contains(t.Name(), "Duration"):
		return `time such as "30s"`
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Float32:
		return "number"
	case t.Kind() >= reflect.Int && t.Kind() <= reflect.Uint64:
		return fmt.Sprintf("whole number of %d bits", t.Bits())
	case t.Kind() == reflect.Struct:
		return "quantity"
	}
	return "string"
}

// shape says what a node is.
func shape(n *yamlnode.Node) string {
	switch n.Kind {
	case yamlnode.MappingNode:
		return "mapping"
	case yamlnode.SequenceNode:
		return "list"
	case yamlnode.AliasNode:
		return "reference"
	}
	return "single value"
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// shorten keeps what somebody wrote from filling the screen.
func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}
