package network

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

func itoa(n int) string { return strconv.Itoa(n) }

// ids of pods are 64 hexadecimal digits.
const (
	podID   = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	otherID = "f123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

// daemonLog is what all managers of a node log. One that is closed may have a plugin run on, and say what became of it.
type daemonLog struct {
	mu  sync.Mutex
	all strings.Builder
}

// Write implements io.Writer.
func (l *daemonLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

// String is all that was logged.
func (l *daemonLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// node is a node with directories of its own and fake plugins, which are shell scripts.
type node struct {
	t                *testing.T
	conf, bin, cache string
	log              string // what the plugins were told, a line for each run
	daemonLog        daemonLog
	exec             []string // types whose programs are run
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{t: t, conf: dir + "/conf", bin: dir + "/bin", cache: dir + "/cache", log: dir + "/log"}
	n.mkdir(n.conf)
	n.mkdir(n.bin)
	return n
}

func (n *node) mkdir(dir string) {
	n.t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) write(file, content string) {
	n.t.Helper()
	n.writeMode(file, content, 0o600)
}

func (n *node) writeMode(file, content string, mode os.FileMode) {
	n.t.Helper()
	// By rename: a program that is open for writing in a process that is just being started cannot be run.
	if err := os.WriteFile(file+"~", []byte(content), mode); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(file+"~", file); err != nil {
		n.t.Fatal(err)
	}
}

// plugin installs a fake one. body runs after the call was logged, with the configuration in $conf.
func (n *node) plugin(typ, body string) {
	n.t.Helper()
	n.writeMode(filepath.Join(n.bin, typ), fmt.Sprintf(`#!/bin/sh
conf=$(cat)
echo "%s $CNI_COMMAND netns=$CNI_NETNS id=$CNI_CONTAINERID if=$CNI_IFNAME args=$CNI_ARGS conf=$conf" >> %s
%s
`, typ, n.log, body), 0o700)
}

const result = `{"cniVersion":"1.0.0","interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/ns"}],
"ips":[{"address":"fd00:90::5/64","interface":1},{"address":"10.90.0.5/24","interface":1},{"address":"10.90.0.1/24","interface":0},{"address":"10.90.0.5/24","interface":1}]}`

// good is a plugin that works.
const good = `if [ "$CNI_COMMAND" = ADD ]; then cat <<'E'
` + result + `
E
fi`

func list(name string, types ...string) string {
	var plugins []string
	for _, typ := range types {
		plugins = append(plugins, fmt.Sprintf(`{"type":%q,"capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"cgroupPath":true,"io.kubernetes.cri.pod-annotations":true}}`, typ))
	}
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[%s]}`, name, strings.Join(plugins, ","))
}

func (n *node) open(change ...func(*Options)) *Manager {
	n.t.Helper()
	o := Options{ConfDir: n.conf, BinDirs: []string{n.bin}, CacheDir: n.cache, Exec: n.exec, Log: slog.New(slog.NewTextHandler(&n.daemonLog, nil))}
	for _, f := range change {
		f(&o)
	}
	m, err := Open(o)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := m.Close(); err != nil {
			n.t.Error(err)
		}
	})
	return m
}

// calls are the commands that plugins ran since the last time, like "a ADD".
func (n *node) calls() []string {
	n.t.Helper()
	var all []string
	for _, line := range n.lines() {
		f := strings.Fields(line)
		all = append(all, f[0]+" "+f[1])
	}
	return all
}

func (n *node) lines() []string {
	n.t.Helper()
	data, err := os.ReadFile(n.log)
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	_ = os.Remove(n.log)
	if len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

func (n *node) same(got []string, want ...string) {
	n.t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		n.t.Errorf("got %q, want %q", got, want)
	}
}

// pod has a namespace of its own.
func (n *node) pod() Pod {
	n.t.Helper()
	return Pod{ID: podID, Name: "web-0", Namespace: "shop", UID: "u-1", NetNS: pinned(n.t, NamespaceSet{}).Net}
}

func (n *node) caches() []string {
	n.t.Helper()
	files, err := filepath.Glob(n.cache + "/results/*")
	if err != nil {
		n.t.Fatal(err)
	}
	return files
}

// told is the configuration that a line of the log has.
func told(t *testing.T, line string) map[string]any {
	t.Helper()
	_, conf, _ := strings.Cut(line, " conf=")
	out := map[string]any{}
	if err := json.Unmarshal([]byte(conf), &out); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return out
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
