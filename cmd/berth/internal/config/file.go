package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/berth-run/berth/internal/spell"
)

// maxFile bounds a configuration file.
const maxFile = 1 << 20

// Files returns the files to load: the given one alone, which must exist, or dir/config.yaml where it exists and
// dir/config.d/*.yaml in the order of their names.
func Files(given, dir string) ([]string, error) {
	if given != "" {
		return []string{given}, nil
	}
	var files []string
	main := filepath.Join(dir, "config.yaml")
	if _, err := os.Stat(main); err == nil {
		files = append(files, main)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	dropIns, err := os.ReadDir(filepath.Join(dir, "config.d"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range dropIns { // ReadDir sorts by name
		if !e.IsDir() && strings.HasSuffix(e.Name(), ".yaml") {
			files = append(files, filepath.Join(dir, "config.d", e.Name()))
		}
	}
	return files, nil
}

// readFile reads one file: its values, and the lines at which they are.
func readFile(file string) (Config, map[string]int, error) {
	f, err := os.Open(file)
	if err != nil {
		return Config{}, nil, fmt.Errorf("configuration file: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Config{}, nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(data) > maxFile {
		return Config{}, nil, fmt.Errorf("%s: more than %d bytes", file, maxFile)
	}
	return parse(file, data)
}

// parse reads strictly. The decoder finds what is wrong, but knows no lines of fields; since a file is one flat mapping,
// they are easy to find.
func parse(file string, data []byte) (Config, map[string]int, error) {
	fail := func(err error) (Config, map[string]int, error) { return Config{}, nil, err }
	var c Config
	known := names(&c)

	var keys map[string]any
	if err := yaml.Unmarshal(data, &keys); err != nil {
		return fail(fmt.Errorf("%s: %s", file, plain(err)))
	}
	lines := make(map[string]int, len(keys))
	var errs []error
	for key := range keys {
		lines[key] = line(data, key)
		if !slices.Contains(known, key) {
			errs = append(errs, fmt.Errorf("%s:%d: unknown field %q, the nearest known is %q", file, lines[key], key, spell.Nearest(key, known)))
		}
	}
	if errs != nil {
		slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
		return fail(errors.Join(errs...))
	}
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		var t *json.UnmarshalTypeError
		if errors.As(err, &t) {
			field, _, _ := strings.Cut(t.Field, ".")
			return fail(fmt.Errorf("%s:%d: %s: a %s cannot be a %s", file, lines[field], field, given(t), wanted(t)))
		}
		return fail(fmt.Errorf("%s: %s", file, plain(err)))
	}
	return c, lines, nil
}

// given and wanted say in YAML's words what a field has and what it takes.
func given(t *json.UnmarshalTypeError) string {
	switch what, _, _ := strings.Cut(t.Value, " "); what {
	case "array":
		return "list"
	case "object":
		return "mapping"
	default:
		return what
	}
}

func wanted(t *json.UnmarshalTypeError) string {
	if t.Type.Kind() == reflect.Slice {
		return "list of strings"
	}
	return t.Type.Kind().String()
}

// plain strips what the layers of the decoder put before the message, which names the line.
func plain(err error) string {
	s := err.Error()
	for _, prefix := range []string{
		"error converting YAML to JSON: ", "error unmarshaling JSON: ", "while decoding JSON: ", "yaml: ", "unmarshal errors:\n  ", "json: ",
	} {
		s = strings.TrimPrefix(s, prefix)
	}
	return s
}

// line is where a key of the outermost mapping stands, from 1; the first line where it is not found, which is where a
// mapping in flow style is.
func line(data []byte, key string) int {
	re := regexp.MustCompile(`^\s*(?:[{,]\s*)?["']?` + regexp.QuoteMeta(key) + `["']?\s*:`)
	for i, l := range strings.Split(string(data), "\n") {
		if re.MatchString(l) {
			return i + 1
		}
	}
	return 1
}

func names(c *Config) []string {
	var out []string
	for _, f := range c.fields() {
		out = append(out, f.name)
	}
	return out
}
