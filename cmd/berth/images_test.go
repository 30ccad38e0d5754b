package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/admin"
	"github.com/berth-run/berth/images/imagestest"
)

// served is a store that is served to tools, and a registry.
type served struct {
	socket string
	store  *images.Store
	reg    *imagestest.Registry
}

func startDaemon(t *testing.T) *served {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked as root")
	}
	dir, err := os.MkdirTemp("", "berth") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	d := &served{socket: filepath.Join(dir, "admin.sock"), reg: imagestest.NewRegistry(t)}
	if d.store, err = images.Open(images.Options{Root: filepath.Join(dir, "images")}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- admin.New(admin.Options{Store: d.store, Log: log}).Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, d.store.Close()); err != nil {
			t.Error(err)
		}
	})
	return d
}

// tool runs a command against the daemon: what it prints, and its exit code.
func (d *served) tool(t *testing.T, args ...string) (out, errs string, code int) {
	t.Helper()
	return d.toolWith(t, strings.NewReader("alice:s3cr3t-pass\n"), args...)
}

// toolWith runs it with that on its standard input.
func (d *served) toolWith(t *testing.T, in io.Reader, args ...string) (out, errs string, code int) {
	t.Helper()
	cmd := command()
	var o, e bytes.Buffer
	cmd.SetOut(&o)
	cmd.SetErr(&e)
	cmd.SetIn(in)
	cmd.SetArgs(append(args, "--address", d.socket))
	if err := cmd.Execute(); err != nil {
		code = exitCode(err)
		if !errors.Is(err, errTold) {
			fmt.Fprintln(&e, err)
		}
	}
	return o.String(), e.String(), code
}

func (d *served) must(t *testing.T, args ...string) string {
	t.Helper()
	out, errs, code := d.tool(t, args...)
	if code != 0 {
		t.Fatalf("%v: exit code %d: %s", args, code, errs)
	}
	return out
}

func TestToolsOfImages(t *testing.T) {
	d := startDaemon(t)
	if out := d.must(t, "images", "list"); out != "IMAGE   TAG   IMAGE ID   SIZE   PINNED\n" {
		t.Errorf("of nothing: %q", out)
	}
	app := d.reg.Push("team/app", "v1", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x"))))
	d.reg.Push("pause", "3.10", imagestest.NewImage(imagestest.Layer(imagestest.File("p", "x"))))
	ref, id := d.reg.Host()+"/team/app:v1", app.ConfigID.String()
	out, errs, code := d.tool(t, "images", "pull", ref)
	if out != id+"\n" || code != 0 || !strings.HasPrefix(errs, ref+": ") || !strings.HasSuffix(errs, " on disk\n") {
		t.Errorf("pull: %q %q, exit code %d", out, errs, code)
	}
	var last admin.Event
	for _, line := range strings.Split(strings.TrimSpace(d.must(t, "images", "pull", "-o", "json", d.reg.Host()+"/pause:3.10")), "\n") {
		last = admin.Event{}
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	if last.Image == nil || !last.Image.Pinned {
		t.Errorf("the last line of pull has %+v", last)
	}

	list := strings.Split(d.must(t, "images", "list"), "\n")
	if len(list) != 4 || !strings.Contains(strings.Join(list, "\n"), d.reg.Host()+"/team/app   v1     "+app.ConfigID.Encoded()[:13]) {
		t.Errorf("list: %q", list)
	}
	for name, want := range map[string]int{"team": 1, "pause": 1, id[7:15]: 1, id[:15]: 1, "nothing": 0, d.reg.Host(): 2} {
		if got := strings.Fields(d.must(t, "images", "list", "-q", name)); len(got) != want {
			t.Errorf("list %s: %q, want %d", name, got, want)
		}
	}
	if out := d.must(t, "images", "list", "--digests", "--no-trunc", "team"); !strings.Contains(out, app.Descriptor.Digest.String()) || !strings.Contains(out, id) {
		t.Errorf("list with digests: %s", out)
	}
	var all admin.List
	if err := json.Unmarshal([]byte(d.must(t, "images", "list", "-o", "json", "team")), &all); err != nil || len(all.Images) != 1 || all.Images[0].ID != app.ConfigID {
		t.Errorf("list as JSON: %+v %v", all, err)
	}
	if out := d.must(t, "images", "inspect", "--bytes", ref); !strings.Contains(out, "ID:         "+id) || !strings.Contains(out, "DIFF ID") {
		t.Errorf("inspect:\n%s", out)
	}
	if out := d.must(t, "images", "du"); !strings.Contains(out, "2 of 2 layers") || !strings.Contains(out, "Freeable:") {
		t.Errorf("du:\n%s", out)
	}
	if out := d.must(t, "images", "pulls"); out != "IMAGE   STATE   LAYERS   FETCHED   OF   FOR\n" {
		t.Errorf("pulls: %q", out)
	}

	if out := d.must(t, "images", "pin", ref, id[:15]); out != "pinned "+ref+" ("+id+")\npinned "+id[:15]+" ("+id+")\n" {
		t.Errorf("pin: %q", out)
	}
	if out := d.must(t, "images", "list", "team"); !strings.Contains(out, "   yes\n") {
		t.Errorf("list of what is pinned: %s", out)
	}
	if _, errs, code := d.tool(t, "images", "remove", ref); code != exitFailure || !strings.Contains(errs, "is pinned") {
		t.Errorf("remove of what is pinned: %q, exit code %d", errs, code)
	}
	pause := d.reg.Host() + "/pause:3.10"
	out, errs, code = d.tool(t, "images", "unpin", ref, pause, "absent")
	if out != "unpinned "+ref+" ("+id+")\n" || code != exitFailure || strings.Count(errs, "\n") != 2 || !strings.Contains(errs, "is a pause image") || !strings.Contains(errs, "not found") {
		t.Errorf("unpin: %q %q, exit code %d", out, errs, code)
	}
	if err := json.Unmarshal([]byte(d.must(t, "images", "list", "-o", "json", "team")), &all); err != nil || all.Images[0].Pinned {
		t.Errorf("list of what is unpinned: %+v %v", all, err)
	}

	if err := d.store.Prepare("c1", app.ConfigID, nil); err != nil {
		t.Fatal(err)
	}
	out, errs, code = d.tool(t, "images", "remove", ref, "absent")
	if out != "" || code != exitFailure || strings.Count(errs, "\n") != 2 || !strings.Contains(errs, "is in use by container c1") || !strings.Contains(errs, "not found") {
		t.Errorf("remove of what is in use, and of nothing: %q %q, exit code %d", out, errs, code)
	}
	if out := d.must(t, "images", "remove", "--force", ref); out != "removed "+ref+" ("+id+")\n" {
		t.Errorf("remove: %q", out)
	}
}

func TestToolRegistryExplain(t *testing.T) {
	d := startDaemon(t)
	d.reg.RequireBasic("alice", "s3cr3t-pass")
	d.reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x"))))
	out := d.must(t, "registry", "explain", "--creds-file", "-", d.reg.Host()+"/a:b")
	for _, want := range []string{
		"Credentials:   from standard input", "1. https://" + d.reg.Host() + "/v2", "401 Unauthorized, wants a password", "has it: sha256:", "nothing is configured for it",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("explain says nothing of %q:\n%s", want, out)
		}
	}
	out, errs, code := d.tool(t, "registry", "explain", "-o", "json", d.reg.Host()+"/a:b")
	if code != exitFailure || !strings.Contains(errs, "no host answers with") {
		t.Errorf("without credentials: %q, exit code %d", errs, code)
	}
	var e struct {
		Credentials string
		Hosts       []struct{ Answer string }
	}
	if err := json.Unmarshal([]byte(out), &e); err != nil || !strings.HasPrefix(e.Credentials, "none given") || len(e.Hosts) != 1 || e.Hosts[0].Answer == "" {
		t.Errorf("as JSON: %s %v", out, err)
	}
}

func TestToolsFailInOneLineWithAnExitCode(t *testing.T) {
	d := startDaemon(t)
	for _, c := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{"images"}, "say which: list, inspect, pull", exitUsage},
		{[]string{"images", "lst"}, `unknown command "lst"`, exitUsage},
		{[]string{"images", "list", "--colour"}, "unknown flag: --colour", exitUsage},
		{[]string{"images", "list", "-o", "yaml"}, `--output: "yaml" is none of text, json`, exitUsage},
		{[]string{"images", "inspect"}, "NAME is missing", exitUsage},
		{[]string{"images", "import", "a.tar", "b.tar"}, `takes one PATH, and has 2: ["a.tar" "b.tar"]`, exitUsage},
		{[]string{"images", "export", "-f", "a", "-d", "b", "x"}, "--file and --dir: give one of them", exitUsage},
		{[]string{"images", "remove"}, "NAME is missing", exitUsage},
		{[]string{"images", "unpin"}, "NAME is missing", exitUsage},
		{[]string{"images", "pull", "--creds-file", "a", "--docker-config", "b", "x"}, "none of the others can be", exitUsage},
		{[]string{"images", "inspect", "absent"}, `image "absent": not found`, exitFailure},
		{[]string{"images", "pull", "UPPER:x"}, "UPPER", exitFailure},
		{[]string{"images", "pull", "--creds-file", "/no/such/file", "x"}, "/no/such/file", exitFailure},
	} {
		out, errs, code := d.tool(t, c.args...)
		if code != c.code || !strings.Contains(errs, c.want) || strings.Count(errs, "\n") != 1 || out != "" {
			t.Errorf("%v: %q %q, exit code %d; want %q and %d", c.args, out, errs, code, c.want, c.code)
		}
	}
	(&served{socket: "/no/such/socket"}).fails(t)
	run := filepath.Join(t.TempDir(), "run")
	if _, err := runTool("images", "list", "--run", run); err == nil || !strings.Contains(err.Error(), "is berth serve running? tried "+run+"/admin/admin.sock") {
		t.Errorf("with --run: %v", err)
	}
}

func (d *served) fails(t *testing.T) {
	t.Helper()
	_, errs, code := d.tool(t, "images", "list")
	if code != exitFailure || !strings.Contains(errs, "is berth serve running? tried "+d.socket) {
		t.Errorf("without a daemon: %q, exit code %d", errs, code)
	}
}

func runTool(args ...string) (string, error) {
	cmd := command()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.Execute()
	return out.String(), err
}

// Every pull that lasts is in the log, each round.
func TestPullsThatLastAreLogged(t *testing.T) {
	status := images.PullStatus{
		Reference: "docker.io/library/a:b", Started: time.Now().Add(-time.Minute), State: images.PullUnpacking,
		Layers: []images.LayerStatus{{Size: 100, Fetched: 40, State: images.LayerFetching}, {Size: 10, Fetched: 10, State: images.LayerUnpacked}},
	}
	fresh := images.PullStatus{Reference: "docker.io/library/fresh:1", Started: time.Now().Add(time.Hour)}
	var out bytes.Buffer
	ctx, stop := context.WithCancel(t.Context())
	rounds := [][]images.PullStatus{{status, fresh}, {status}}
	logPulls(ctx, slog.New(slog.NewTextHandler(&out, nil)), func() (now []images.PullStatus) {
		if len(rounds) == 0 {
			stop()
			return nil
		}
		now, rounds = rounds[0], rounds[1:]
		return now
	}, time.Millisecond)
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || strings.Contains(out.String(), "fresh") {
		t.Errorf("two rounds, of which the second has nothing new:\n%s", out.String())
	}
	for _, want := range []string{"image=docker.io/library/a:b", "state=unpacking", "layers=2", "layersHere=1", "fetched=50", "of=110", "since=1m0s"} {
		if !strings.Contains(lines[0], want) {
			t.Errorf("there is no %s in %s", want, lines[0])
		}
	}
}
