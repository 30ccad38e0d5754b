package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	podA = "aa00000000000000000000000000000000000000000000000000000000000001"
	podB = "aa00000000000000000000000000000000000000000000000000000000000002"
	ctrA = "cc00000000000000000000000000000000000000000000000000000000000001"
)

func somePod(id string) *podRecord {
	return &podRecord{
		ID: id, Boot: "b", Phase: ready, Steps: []string{"dirs", "network"}, CreatedAt: time.Unix(1700000000, 5).UTC(), Cgroup: "/x/" + id,
		Config: message[*cri.PodSandboxConfig]{M: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u", Attempt: 3},
			Labels:   map[string]string{"a/b": "c", "leer": ""}, Annotations: map[string]string{"x": "ä\n\"y"},
			Linux: &cri.LinuxPodSandboxConfig{Sysctls: map[string]string{"net.core.somaxconn": "1"}},
		}},
	}
}

func someContainer(id, pod string) *containerRecord {
	return &containerRecord{
		ID: id, SandboxID: pod, Boot: "b", Phase: starting, CreatedAt: time.Unix(1700000000, 0).UTC(), ImageID: "sha256:1",
		Config: message[*cri.ContainerConfig]{M: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "app", Attempt: 7}, Labels: map[string]string{"io.kubernetes.container.restartCount": "7"},
			Annotations: map[string]string{"io.kubernetes.container.hash": "abc"},
		}},
		User: message[*cri.ContainerUser]{M: &cri.ContainerUser{Linux: &cri.LinuxContainerUser{Uid: 1, SupplementalGroups: []int64{1, 2}}}},
	}
}

func TestRecordsComeBackAsTheyWere(t *testing.T) {
	files, err := openRecords(filepath.Join(t.TempDir(), "pods"))
	if err != nil {
		t.Fatal(err)
	}
	want := somePod(podA)
	if err := files.save(podA, want); err != nil {
		t.Fatal(err)
	}
	var got *podRecord
	_, err = files.load(slog.Default(), func(id string, data []byte) (err error) {
		got, err = decodePod(id, data)
		return err
	})
	if err != nil || got == nil {
		t.Fatalf("record %v, %v", got, err)
	}
	if !proto.Equal(got.Config.M, want.Config.M) || got.Phase != want.Phase || !got.CreatedAt.Equal(want.CreatedAt) || strings.Join(got.Steps, " ") != "dirs network" {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if fi, err := os.Stat(files.path(podA)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("record has mode %v, %v", fi.Mode(), err)
	}
}

func TestTornRecordsAreSetAside(t *testing.T) {
	whole, err := json.Marshal(somePod(podA))
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(whole) {
		files, err := openRecords(filepath.Join(t.TempDir(), "pods"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(files.path(podA), whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := files.save(podB, somePod(podB)); err != nil {
			t.Fatal(err)
		}
		var found []string
		lost, err := files.load(slog.New(slog.DiscardHandler), func(id string, data []byte) error {
			rec, err := decodePod(id, data)
			if err == nil {
				found = append(found, rec.ID)
			}
			return err
		})
		if err != nil || len(found) != 1 || found[0] != podB || len(lost) != 1 || lost[0] != podA {
			t.Fatalf("cut at %d: found %v, lost %v, %v", cut, found, lost, err)
		}
		if _, err := os.Stat(files.path(podA) + ".damaged"); err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
}

func TestLaterRecordsAreLeftAlone(t *testing.T) {
	for name, text := range map[string]string{
		"format":            fmt.Sprintf(`{"Version": %d}`, recordVersion+1),
		"types":             fmt.Sprintf(`{"Version": %d, "Steps": {}, "Config": 1}`, recordVersion+1),
		"named oldest":      fmt.Sprintf(`{"Version": %d, "Reader": %d}`, recordVersion+5, recordVersion+1),
		"without a version": fmt.Sprintf(`{"Reader": %d}`, recordVersion+1),
	} {
		files, err := openRecords(filepath.Join(t.TempDir(), "pods"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(files.path(podA), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = files.load(slog.Default(), func(id string, data []byte) error {
			_, err := decodePod(id, data)
			return err
		})
		if !errors.Is(err, errLaterVersion) || !strings.Contains(err.Error(), podA) {
			t.Errorf("%s: error is %v", name, err)
		}
		if is, err := os.ReadFile(files.path(podA)); err != nil || string(is) != text {
			t.Errorf("%s: the record of a later release is %q, %v", name, is, err)
		}
	}
}

// TestRecordsGoToALaterVersionAndBack: what a later daemon has noted, and may be passed over, is there when it comes again.
func TestRecordsGoToALaterVersionAndBack(t *testing.T) {
	files, err := openRecords(filepath.Join(t.TempDir(), "pods"))
	if err != nil {
		t.Fatal(err)
	}
	made := somePod(podA)
	made.Handler = "kata"
	if err := files.save(podA, made); err != nil {
		t.Fatal(err)
	}
	read := func() map[string]any {
		t.Helper()
		text, err := os.ReadFile(files.path(podA))
		if err != nil {
			t.Fatal(err)
		}
		var rec map[string]any
		if err := json.Unmarshal(text, &rec); err != nil {
			t.Fatal(err)
		}
		return rec
	}
	later := read()
	later["Version"], later["Reader"], later["Colour"] = recordVersion+1, recordReader, map[string]any{"name": "red"}
	later["Config"].(map[string]any)["berths_in_moon_harbour"] = []any{"one"}
	text, err := json.Marshal(later)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodePod(podA, text)
	if err != nil {
		t.Fatal(err)
	}
	if got.Handler != "kata" || !proto.Equal(got.Config.M, made.Config.M) {
		t.Errorf("read as %+v", got)
	}
	got.Reason = "a change by the older daemon"
	for range 2 { // what is read again is kept as well
		if err := files.save(podA, got); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(files.path(podA))
		if err != nil {
			t.Fatal(err)
		}
		if got, err = decodePod(podA, data); err != nil {
			t.Fatal(err)
		}
	}
	want, err := json.Marshal(later)
	if err != nil {
		t.Fatal(err)
	}
	is := read()
	if is["Reason"] != "a change by the older daemon" {
		t.Errorf("the change is lost: %v", is)
	}
	delete(is, "Reason")
	if text, err := json.Marshal(is); err != nil || string(text) != string(want) {
		t.Errorf("it is %s, %v\nwant  %s", text, err, want)
	}
}

func TestHalfWrittenReplacementIsDropped(t *testing.T) {
	files, err := openRecords(filepath.Join(t.TempDir(), "pods"))
	if err != nil {
		t.Fatal(err)
	}
	if err := files.save(podA, somePod(podA)); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(files.dir, "."+podA)
	if err := os.WriteFile(tmp, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	if _, err := files.load(slog.Default(), func(string, []byte) error { n++; return nil }); err != nil || n != 1 {
		t.Errorf("%d records, %v", n, err)
	}
	if _, err := os.Stat(tmp); !errors.Is(err, os.ErrNotExist) {
		t.Error("the half-written file is still there")
	}
}

func FuzzPodRecord(f *testing.F) {
	whole, err := json.Marshal(somePod(podA))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(`{"Version":1,"ID":"` + podA + `","Config":{"metadata":null}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := decodePod(podA, data)
		if err != nil {
			return
		}
		if rec.ID != podA || rec.Config.M.Metadata == nil {
			t.Errorf("accepted %+v", rec)
		}
		again, err := json.Marshal(rec)
		if err != nil {
			t.Fatalf("cannot be written again: %v", err)
		}
		if _, err := decodePod(podA, again); err != nil {
			t.Errorf("cannot be read again: %v", err)
		}
	})
}

func FuzzContainerRecord(f *testing.F) {
	whole, err := json.Marshal(someContainer(ctrA, podA))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := decodeContainer(ctrA, data)
		if err != nil {
			return
		}
		again, err := json.Marshal(rec)
		if err != nil {
			t.Fatalf("cannot be written again: %v", err)
		}
		if _, err := decodeContainer(ctrA, again); err != nil {
			t.Errorf("cannot be read again: %v", err)
		}
	})
}

// A record that is written again and again is whole each time, makes no file but its spare, and leaves none.
func TestRecordsChangePlacesWithASpare(t *testing.T) {
	files, err := openRecords(filepath.Join(t.TempDir(), "pods"))
	if err != nil {
		t.Fatal(err)
	}
	inodes := map[uint64]bool{}
	for i := range 20 {
		rec := somePod(podA)
		rec.Reason = strings.Repeat("r", 1000*((i*7)%20)) // longer and shorter than what the spare has
		if err := files.save(podA, rec); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(files.path(podA))
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodePod(podA, data)
		if err != nil || got.Reason != rec.Reason {
			t.Fatalf("write %d: %v: reason of %d bytes, not %d", i, err, len(got.Reason), len(rec.Reason))
		}
		var st unix.Stat_t
		if err := unix.Stat(files.path(podA), &st); err != nil || st.Mode&0o777 != 0o600 {
			t.Fatalf("mode %o, %v", st.Mode, err)
		}
		inodes[st.Ino] = true
	}
	if len(inodes) != 2 {
		t.Errorf("20 writes have made %d files, not 2", len(inodes))
	}
	if err := files.remove(podA); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(files.dir); err != nil || len(left) != 0 {
		t.Errorf("%v, %v are left", left, err)
	}
}

func BenchmarkSave(b *testing.B) {
	dir, err := os.MkdirTemp("/var/lib", "berth-records-") // a real disk: b.TempDir is often a tmpfs
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	files, err := openRecords(dir)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := files.save(podA, somePod(podA)); err != nil {
			b.Fatal(err)
		}
	}
}
