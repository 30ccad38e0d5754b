package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// exported exports images.
func exported(t *testing.T, s *Store, names ...string) ([]byte, *ExportReport) {
	t.Helper()
	var archive bytes.Buffer
	report, err := s.Export(context.Background(), names, &archive)
	if err != nil {
		t.Fatal(err)
	}
	return archive.Bytes(), report
}

// inArchive are the files of a tar file.
func inArchive(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		hdr, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err == nil {
			files[hdr.Name], err = io.ReadAll(r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func imported(s *Store, archive []byte, o ImportOptions) ([]*Image, error) {
	return s.Import(context.Background(), bytes.NewReader(archive), o)
}

// TestImageToANodeWithoutNetwork: what is exported on one node and imported on another is the same image by the same
// names, also by the digests that pods name it by, and is pinned (k8s#81756, #106037, k3s#9188).
func TestImageToANodeWithoutNetwork(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprintf("kept blobs %v", keep), func(t *testing.T) {
			from := openStore(t, func(o *Options) { o.KeepBlobs = keep })
			to := openStore(t)
			reg := imagestest.NewRegistry(t)
			img := imagestest.NewImage(richLayer(), imagestest.ZstdLayer(imagestest.Tar(imagestest.File("g", "2"))), imagestest.PlainLayer(imagestest.Tar(imagestest.File("h", "3"))))
			img.Config.Config.Env = []string{"A=<b&c>"} // not as Go would write it
			built := img.Build()
			other := imagestest.NewImage(imagestest.Layer(imagestest.File("f", "arm")))
			other.Config.Architecture = "none"
			index := reg.PushIndex("team/app", "v1", reg.Push("team/app", "", other).Descriptor, reg.Push("team/app", "", img).Descriptor)
			reg.Push("other", "v2", img)
			one := mustPull(t, from, reg.Host()+"/team/app:v1")
			mustPull(t, from, reg.Host()+"/other:v2")
			one, err := from.Image(string(one.ID))
			if err != nil {
				t.Fatal(err)
			}
			archive, report := exported(t, from, reg.Host()+"/team/app:v1")
			if len(report.Images) != 1 || report.Images[0].Manifest != built.Descriptor.Digest || report.Images[0].Exact() != keep {
				t.Errorf("report %+v", report)
			}
			for i, l := range report.Images[0].Layers {
				if exact := l.Digest == l.Exported; exact != (l.Why == "") || exact != (keep || i != 1) { // zstd is not tried again
					t.Errorf("layer %d: %+v", i+1, l)
				}
			}
			before := len(reg.Requests())
			imgs, err := imported(to, archive, ImportOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if len(imgs) != 4 || len(to.Images()) != 1 {
				t.Errorf("%d imported, %d there", len(imgs), len(to.Images()))
			}
			got, err := to.Image(reg.Host() + "/team/app@" + index.Digest.String())
			if err != nil {
				t.Fatal(err)
			}
			if got.ID != one.ID || got.ID != built.ConfigID || !slices.Equal(got.RepoTags, one.RepoTags) || !slices.Equal(got.RepoDigests, one.RepoDigests) ||
				got.Size != one.Size || !got.Pinned || got.Config.Config.Env[0] != "A=<b&c>" {
				t.Errorf("imported %+v\nexported %+v", got, one)
			}
			if n := len(reg.Requests()); n != before {
				t.Errorf("%d requests to the registry", n-before)
			}
			wantWhole(t, to)
			// What was imported can be exported, too.
			again, _ := exported(t, to, string(got.ID))
			third := openStore(t)
			if _, err := imported(third, again, ImportOptions{Unpinned: true}); err != nil {
				t.Fatal(err)
			}
			if got, err := third.Image(reg.Host() + "/other@" + built.Descriptor.Digest.String()); err != nil || got.ID != one.ID || got.Pinned {
				t.Errorf("by digest on a third node: %+v, %v", got, err)
			}
			wantWhole(t, third)
		})
	}
}

// TestImportNames: an archive without names, with one, and names given by the operator; from a stream, and compressed.
func TestImportNames(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	img := mustPull(t, s, reg.Host()+"/a:b")
	archive, _ := exported(t, s, string(img.ID))
	for _, data := range [][]byte{archive, imagestest.Gzip(archive), imagestest.Zstd(archive)} {
		to := openStore(t)
		imgs, err := imported(to, data, ImportOptions{Names: []string{"mine.example/x:1", "busybox"}})
		if err != nil {
			t.Fatal(err)
		}
		if want := []string{"docker.io/library/busybox:latest", "mine.example/x:1"}; len(imgs) != 1 || !slices.Equal(imgs[0].RepoTags, want) {
			t.Errorf("imported %+v, want the tags %v", imgs, want)
		}
		if id, err := to.SetPinned(context.Background(), "busybox", false); err != nil || id != imgs[0].ID {
			t.Fatal(id, err)
		}
		if img, err := to.Image("busybox"); err != nil || img.Pinned {
			t.Errorf("after unpinning: %+v, %v", img, err)
		}
		if left := leftovers(t, to); len(left) != 1 {
			t.Errorf("left: %v", left)
		}
	}
	reg.Push("a", "c", smallImage("y"))
	other := mustPull(t, s, reg.Host()+"/a:c")
	both, _ := exported(t, s, string(img.ID), string(other.ID))
	if _, err := imported(s, both, ImportOptions{Names: []string{"x"}}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "there are 2 images") {
		t.Errorf("one name for two images, each listed by tag and by digest: %v", err)
	}
	if _, err := imported(s, archive, ImportOptions{Names: []string{"UPPER"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad name: %v", err)
	}
}

// TestImportOfWhatCannotBeRead: nothing is wrong with the image.
func TestImportOfWhatCannotBeRead(t *testing.T) {
	s := openStore(t)
	archive := imagestest.Tar(ociEntries(t, smallImage("x").Build(), "a:b")...)
	broken := errors.New("broken off")
	for name, data := range map[string][]byte{"tar": archive, "gzip": imagestest.Gzip(archive), "zstd": imagestest.Zstd(archive)} {
		for _, n := range []int{0, 1, 5, len(data) / 2, len(data)} {
			imgs, err := s.Import(context.Background(), io.MultiReader(bytes.NewReader(data[:n]), failing{broken}), ImportOptions{})
			if len(imgs) != 0 || !errors.Is(err, broken) || errors.Is(err, errImage) {
				t.Errorf("%s, after %d of %d bytes: %v, %v", name, n, len(data), imgs, err)
			}
		}
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestDockerArchive is as docker save before version 25 wrote it: layers by directories of their own, a link for one that
// was written before.
func TestDockerArchive(t *testing.T) {
	s := openStore(t)
	one, two := imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", "1"))), imagestest.Layer(imagestest.File("g", "2"))
	img := imagestest.NewImage(one, two, one)
	built := img.Build()
	config := strings.TrimPrefix(string(built.ConfigID), "sha256:") + ".json"
	entries := []imagestest.Entry{
		imagestest.Dir("aa"), imagestest.File("aa/layer.tar", string(one.Blob)), imagestest.File("aa/VERSION", "1.0"),
		imagestest.File("bb/layer.tar", string(two.Blob)), imagestest.Symlink("cc/layer.tar", "../aa/layer.tar"),
		imagestest.File(config, string(built.Blobs[built.ConfigID])),
		imagestest.File(dockerIndex, asJSON(t, []dockerLayoutImage{{Config: config, RepoTags: []string{"app:1", "app:2"}, Layers: []string{"aa/layer.tar", "bb/layer.tar", "cc/layer.tar"}}})),
		imagestest.File("repositories", "{}"),
	}
	imgs, err := imported(s, imagestest.Tar(entries...), ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := imgs[len(imgs)-1]
	if got.ID != built.ConfigID || !slices.Equal(got.RepoTags, []string{"docker.io/library/app:1", "docker.io/library/app:2"}) || len(got.RepoDigests) != 0 || !got.Pinned {
		t.Errorf("imported %+v", got)
	}
	wantWhole(t, s)
	target := mountPoint(t)
	if err := s.MountView(context.Background(), got.ID, target, nil); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(target, "g")); err != nil || string(data) != "2" {
		t.Errorf("%q, %v", data, err)
	}
	// And out again, in a form that docker reads: uncompressed layers by their diff ids.
	archive, _ := exported(t, s, "app:1")
	files := inArchive(t, archive)
	var list []dockerLayoutImage
	if err := json.Unmarshal(files[dockerIndex], &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || !slices.Equal(list[0].RepoTags, []string{"docker.io/library/app:1", "docker.io/library/app:2"}) || len(list[0].Layers) != 3 || list[0].Layers[0] != list[0].Layers[2] {
		t.Errorf("%s: %+v", dockerIndex, list)
	}
	for _, name := range append(list[0].Layers, list[0].Config) {
		if data, ok := files[name]; !ok || digest.FromBytes(data).Encoded() != filepath.Base(name) {
			t.Errorf("%s is there: %v", name, ok)
		}
	}
}

// ociEntries is an OCI layout of an image.
func ociEntries(t *testing.T, built *imagestest.Built, name string) []imagestest.Entry {
	t.Helper()
	desc := built.Descriptor
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	entries := []imagestest.Entry{
		imagestest.File(ocispec.ImageLayoutFile, `{"imageLayoutVersion":"1.0.0"}`),
		imagestest.File(ocispec.ImageIndexFile, asJSON(t, ocispec.Index{Manifests: []ocispec.Descriptor{desc}})),
		imagestest.File(blobName(desc.Digest), string(built.Manifest)),
	}
	for d, data := range built.Blobs {
		entries = append(entries, imagestest.File(blobName(d), string(data)))
	}
	slices.SortFunc(entries, func(a, b imagestest.Entry) int { return strings.Compare(a.Name, b.Name) })
	return entries
}

// TestHostileArchives: archives that try to get out, that lie or are not whole. Each is refused with an error that says
// why, nothing of it stays, and the next good one is imported.
func TestHostileArchives(t *testing.T) {
	built := imagestest.NewImage(imagestest.Layer(imagestest.File("f", "1"))).Build()
	evil := imagestest.NewImage(imagestest.Layer(imagestest.File("f", "1"), imagestest.HardLink("l", "../../etc/passwd"))).Build()
	good := func(t *testing.T) []imagestest.Entry { return ociEntries(t, built, "registry.example/good:1") }
	var manifest ocispec.Manifest
	if err := json.Unmarshal(built.Manifest, &manifest); err != nil {
		t.Fatal(err)
	}
	layer := blobName(manifest.Layers[0].Digest)
	without := func(entries []imagestest.Entry, name string) []imagestest.Entry {
		return slices.DeleteFunc(entries, func(e imagestest.Entry) bool { return e.Name == name })
	}
	with := func(entries []imagestest.Entry, more ...imagestest.Entry) []imagestest.Entry {
		for _, e := range more {
			entries = without(entries, e.Name)
		}
		return append(entries, more...)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	docker := func(img dockerLayoutImage, more ...imagestest.Entry) []imagestest.Entry {
		return append(more, imagestest.File(dockerIndex, asJSON(t, []dockerLayoutImage{img})))
	}
	config := imagestest.File("c.json", string(built.Blobs[built.ConfigID]))
	for name, c := range map[string]struct {
		entries []imagestest.Entry
		is      func(error) bool
		said    string
	}{
		"dotdot":                   {with(good(t), imagestest.File("../evil", "x")), errdefs.IsFailedPrecondition, "leads out"},
		"dotdot inside":            {with(good(t), imagestest.File("blobs/../../evil", "x")), errdefs.IsFailedPrecondition, "leads out"},
		"absolute":                 {with(good(t), imagestest.File("/etc/evil", "x")), errdefs.IsFailedPrecondition, "leads out"},
		"twice":                    {append(good(t), imagestest.File(layer, "other")), errdefs.IsFailedPrecondition, "twice"},
		"twice by another name":    {append(good(t), imagestest.File("./"+layer, "other")), errdefs.IsFailedPrecondition, "twice"},
		"symlink out":              {with(good(t), imagestest.Symlink(layer, outside)), errdefs.IsFailedPrecondition, "leads out"},
		"symlink up":               {with(good(t), imagestest.Symlink(layer, "../../../../outside")), errdefs.IsFailedPrecondition, "leads out"},
		"symlink to symlink":       {with(good(t), imagestest.Symlink(layer, "other"), imagestest.Symlink("blobs/sha256/other", "third")), errdefs.IsFailedPrecondition, "link to a link"},
		"symlink to itself":        {with(good(t), imagestest.Symlink(layer, filepath.Base(layer))), errdefs.IsFailedPrecondition, "link to a link"},
		"hard link out":            {with(good(t), imagestest.HardLink(layer, "../outside")), errdefs.IsFailedPrecondition, "leads out"},
		"device":                   {with(good(t), imagestest.Char(layer, 1, 3)), errdefs.IsFailedPrecondition, "neither a file nor a link"},
		"fifo":                     {with(good(t), imagestest.Fifo(layer)), errdefs.IsFailedPrecondition, "neither a file nor a link"},
		"sparse":                   {with(good(t), imagestest.GNUSparse("big", 1<<30, 1<<20, "x")), errdefs.IsFailedPrecondition, "sparse"},
		"absurd size":              {[]imagestest.Entry{headerOnly(t, "index.json", 1<<60)}, errdefs.IsFailedPrecondition, "not all"},
		"index of 5 MiB":           {with(good(t), imagestest.File(ocispec.ImageIndexFile, strings.Repeat(" ", 5<<20))), errdefs.IsResourceExhausted, "bytes"},
		"index is no JSON":         {with(good(t), imagestest.File(ocispec.ImageIndexFile, "<")), errdefs.IsFailedPrecondition, "index.json"},
		"index without images":     {with(good(t), imagestest.File(ocispec.ImageIndexFile, "{}")), errdefs.IsFailedPrecondition, "no image"},
		"what skopeo calls a dir":  {[]imagestest.Entry{imagestest.File(dockerIndex, string(built.Manifest))}, errdefs.IsFailedPrecondition, "manifest.json has object where"},
		"no index":                 {without(good(t), ocispec.ImageIndexFile), errdefs.IsFailedPrecondition, "no OCI layout"},
		"empty":                    {nil, errdefs.IsFailedPrecondition, "no OCI layout"},
		"manifest missing":         {without(good(t), blobName(built.Descriptor.Digest)), errdefs.IsNotFound, built.Descriptor.Digest.Encoded()},
		"layer missing":            {without(good(t), layer), errdefs.IsNotFound, filepath.Base(layer)},
		"config missing":           {without(good(t), blobName(built.ConfigID)), errdefs.IsNotFound, built.ConfigID.Encoded()},
		"manifest of other bytes":  {with(good(t), imagestest.File(blobName(built.Descriptor.Digest), strings.Repeat("x", len(built.Manifest)))), isContentError, built.Descriptor.Digest.Encoded()},
		"layer of other bytes":     {with(good(t), imagestest.File(layer, strings.Repeat("x", int(manifest.Layers[0].Size)))), func(err error) bool { return errdefs.IsFailedPrecondition(err) || isContentError(err) }, filepath.Base(layer)},
		"layer too short":          {with(good(t), imagestest.File(layer, "")), func(err error) bool { return errdefs.IsFailedPrecondition(err) || isContentError(err) }, filepath.Base(layer)},
		"layer too long":           {with(good(t), imagestest.File(layer, string(built.Blobs[manifest.Layers[0].Digest])+"x")), func(err error) bool { return errdefs.IsFailedPrecondition(err) || isContentError(err) }, filepath.Base(layer)},
		"hostile layer":            {ociEntries(t, evil, "x:1"), errdefs.IsFailedPrecondition, "hard link"},
		"bad name":                 {ociEntries(t, built, "registry.example/UPPER:1"), errdefs.IsInvalidArgument, "UPPER"},
		"name of another digest":   {ociEntries(t, built, "x@sha256:"+someHex), errdefs.IsFailedPrecondition, someHex},
		"digest is a path":         {with(good(t), imagestest.File(ocispec.ImageIndexFile, `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:../../x","size":9}]}`)), errdefs.IsFailedPrecondition, "digest"},
		"negative size":            {with(good(t), imagestest.File(ocispec.ImageIndexFile, fmt.Sprintf(`{"manifests":[{"digest":%q,"size":-1}]}`, built.Descriptor.Digest))), errdefs.IsFailedPrecondition, "size"},
		"berth.json lies":          {with(good(t), imagestest.File(berthIndex, fmt.Sprintf(`{"images":[{"name":"a@sha256:%s","document":{"digest":%q,"size":%d}}]}`, someHex, built.Descriptor.Digest, len(built.Manifest)))), errdefs.IsFailedPrecondition, someHex},
		"docker: layer is a path":  {docker(dockerLayoutImage{Config: "c.json", RepoTags: []string{"a:b"}, Layers: []string{"../../outside"}}, config), errdefs.IsFailedPrecondition, "leads out"},
		"docker: config is a path": {docker(dockerLayoutImage{Config: "/etc/passwd", Layers: []string{"l"}}, config), errdefs.IsFailedPrecondition, "leads out"},
		"docker: config of 5 MiB":  {docker(dockerLayoutImage{Config: "c.json"}, imagestest.File("c.json", strings.Repeat(" ", 5<<20))), errdefs.IsResourceExhausted, "bytes"},
		"docker: layers too few":   {docker(dockerLayoutImage{Config: "c.json"}, config), errdefs.IsFailedPrecondition, "layers"},
		"docker: layer missing":    {docker(dockerLayoutImage{Config: "c.json", Layers: []string{"l"}}, config), errdefs.IsNotFound, "l"},
		"docker: layer of another": {docker(dockerLayoutImage{Config: "c.json", Layers: []string{"l"}}, config, imagestest.File("l", string(imagestest.Tar(imagestest.File("f", "2"))))), func(err error) bool { return errdefs.IsFailedPrecondition(err) || isContentError(err) }, "layer 1"},
		"docker: id of another":    {docker(dockerLayoutImage{Config: someHex + ".json", Layers: []string{"l"}}, imagestest.File(someHex+".json", string(built.Blobs[built.ConfigID])), imagestest.File("l", "x")), isContentError, someHex},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			imgs, err := imported(s, imagestest.Tar(c.entries...), ImportOptions{})
			if err == nil || len(imgs) != 0 || !c.is(err) || !strings.Contains(err.Error(), c.said) {
				t.Errorf("got %v, %v; want an error of its class that says %q", imgs, err, c.said)
			}
			if left := leftovers(t, s); len(left) != 0 || len(s.Images()) != 0 {
				t.Errorf("left: %v, %v", left, s.Images())
			}
			if _, err := imported(s, imagestest.Tar(good(t)...), ImportOptions{}); err != nil {
				t.Errorf("the next: %v", err)
			}
			wantWhole(t, s)
		})
	}
}

// headerOnly is an entry that promises more bytes than it has.
func headerOnly(t *testing.T, name string, size int64) imagestest.Entry {
	t.Helper()
	var buf bytes.Buffer
	if err := tar.NewWriter(&buf).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	return imagestest.Entry{Raw: buf.Bytes()}
}

func isContentError(err error) bool { return errors.Is(err, errContent) }

// TestImportForAnotherPlatform says so, and imports what else there is.
func TestImportForAnotherPlatform(t *testing.T) {
	s := openStore(t)
	img := smallImage("x")
	img.Config.Architecture = "none"
	if _, err := imported(s, imagestest.Tar(ociEntries(t, img.Build(), "a:b")...), ImportOptions{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/none") {
		t.Errorf("got %v", err)
	}
}

// TestExportSaysWhatItCannot: what was pulled by an earlier version, what is damaged, what is not there.
func TestExportSaysWhatItCannot(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "one"), imagestest.File("f", "two"))))
	reg.Push("a", "c", smallImage("x"))
	img := mustPull(t, s, reg.Host()+"/a:b")
	other := mustPull(t, s, reg.Host()+"/a:c")
	try := func(name string) error {
		_, err := s.Export(context.Background(), []string{name}, io.Discard)
		return err
	}
	if err := try(string(img.ID)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "keep blobs") {
		t.Errorf("entries that replace each other: %v", err)
	}
	if err := try("nothing:here"); !errdefs.IsNotFound(err) || strings.Count(err.Error(), "nothing:here") != 1 {
		t.Errorf("no image: %v", err)
	}
	if err := overwrite(s.path(layersDir, other.Layers[0].dir(), "f"), 0); err != nil {
		t.Fatal(err)
	}
	if err := try(string(other.ID)); !errors.Is(err, errDamaged) {
		t.Errorf("damaged: %v", err)
	}
	mustPull(t, s, reg.Host()+"/a:c")
	if err := try(string(other.ID)); err != nil {
		t.Errorf("mended: %v", err)
	}
	old := *s.images[img.ID]
	old.Documents, old.Blobs = nil, nil
	if err := s.apply(changes{putImages: map[digest.Digest]*imageRecord{img.ID: &old}}); err != nil {
		t.Fatal(err)
	}
	if err := try(string(img.ID)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "earlier version") {
		t.Errorf("of an earlier version: %v", err)
	}
	mustPull(t, s, reg.Host()+"/a:b")
	if rec := s.images[img.ID]; len(rec.Documents) != 2 || len(rec.Blobs) != 1 {
		t.Errorf("after the next pull: %+v", rec)
	}
}
