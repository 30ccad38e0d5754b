package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// VerifyOptions say how a store is verified.
type VerifyOptions struct {
	// Deep reads all contents. Without it names, kinds, sizes, times, owners, modes and attributes are compared, which finds
	// what a power cut or a hand on the node does, and not what only a disk knows.
	Deep bool `json:"deep"`
	// Repair fetches again the layers that are damaged, and no others, without credentials, and drops records that lead
	// nowhere. What it cannot fetch is fetched by the next pull of the image.
	Repair bool `json:"repair"`
}

// Kinds of findings.
const (
	FoundDatabase  = "database"  // the database's own structure
	FoundLayer     = "layer"     // a layer's directory, or what is recorded of it
	FoundBlob      = "blob"      // a compressed layer that is kept
	FoundImage     = "image"     // an image's record
	FoundReference = "reference" // a reference that leads to no image
	FoundLeftover  = "leftover"  // a file of the store that belongs to nothing
)

// Finding is something that is not as it should be.
type Finding struct {
	Kind string `json:"kind"`
	// Layer, Path in it, Image and Reference are what it is about, as far as there is any.
	Layer     ChainID       `json:"layer,omitempty"`
	Path      string        `json:"path,omitempty"`
	Image     digest.Digest `json:"image,omitempty"`
	Reference string        `json:"reference,omitempty"`
	// What is wrong.
	What string `json:"what"`
	// Images that have the layer, sorted. While it is damaged they are not listed.
	Images   []digest.Digest `json:"images,omitempty"`
	Repaired bool            `json:"repaired,omitempty"`
	// Error is why it could not be repaired, where that was asked for.
	Error string `json:"error,omitempty"`
}

// String returns the finding as a line.
func (f Finding) String() string {
	parts := []string{f.Kind}
	for _, p := range []string{string(f.Layer), string(f.Image), f.Reference} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if f.Path != "" {
		parts = append(parts, quote(f.Path))
	}
	return strings.Join(parts, " ") + ": " + f.What
}

// Report is what a verification found.
type Report struct {
	Findings []Finding `json:"findings"`
	// Images, Layers and Bytes (of layers, on disk) were looked at.
	Images int    `json:"images"`
	Layers int    `json:"layers"`
	Bytes  uint64 `json:"bytes"`
	// Unverifiable are layers that an earlier version of berth unpacked, which kept no record of what they are like.
	Unverifiable []ChainID `json:"unverifiable,omitempty"`
	// Omitted counts findings beyond the first hundred of a layer.
	Omitted int `json:"omitted,omitempty"`
}

// Damaged tells whether something is wrong that is not repaired.
func (r *Report) Damaged() bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return !f.Repaired })
}

// findingsPerLayer bounds what is told of one layer.
const findingsPerLayer = 100

// Verify compares the store with what it was when its layers were unpacked. Layers that are found damaged are marked, so
// that the next pull of an image fetches them; until then their images are not listed, and cannot be mounted. Containers
// that run stay as they are. Pulls, removals and mounts may go on meanwhile.
//
// The error is that of the verification itself; what it finds is in the report.
func (s *Store) Verify(ctx context.Context, o VerifyOptions) (*Report, error) {
	v := &verification{s: s, ctx: ctx, o: o, report: &Report{Findings: []Finding{}}}
	if err := v.run(); err != nil {
		return v.report, fmt.Errorf("verify images: %w", err)
	}
	return v.report, nil
}

type verification struct {
	s      *Store
	ctx    context.Context
	o      VerifyOptions
	report *Report
	looked Tally // at
}

func (v *verification) find(f Finding) { v.report.Findings = append(v.report.Findings, f) }

func (v *verification) run() error {
	s := v.s
	if err := v.database(); err != nil || len(v.report.Findings) > 0 {
		return err // bbolt must not be asked for what is in wrong pages, and nothing can be put on record
	}
	if err := v.records(); err != nil {
		return err
	}
	s.mu.RLock()
	chains := slices.Sorted(maps.Keys(s.layers))
	v.report.Images = len(s.images)
	s.mu.RUnlock()
	for _, chain := range chains {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		if !s.hold(chain) {
			continue // removed since
		}
		err := v.layer(chain)
		s.unhold(chain)
		if err != nil {
			return err
		}
	}
	if v.o.Repair {
		v.repair()
	}
	// What was removed while it was held here was left for us to delete.
	return s.collectUnused()
}

// database looks for damage of the database's own structure. Nothing is written meanwhile.
func (v *verification) database() error {
	v.s.change.Lock()
	defer v.s.change.Unlock()
	var wrong []error
	f, err := os.Open(v.s.path(dbName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		wrong, err = []error{errors.New("is missing")}, nil
	case err == nil:
		defer f.Close()
		wrong, err = checkDatabase(f, nil)
	}
	for _, w := range wrong[:min(len(wrong), findingsPerLayer)] {
		found := Finding{Kind: FoundDatabase, What: w.Error()}
		if v.o.Repair {
			found.Error = "a database is made anew, of what can be read of it, when berth serve starts: restart it"
		}
		v.find(found)
	}
	return err
}

// records looks for records that lead nowhere, and files that no record leads to. Nothing changes meanwhile.
func (v *verification) records() error {
	s := v.s
	s.change.Lock()
	defer s.change.Unlock()
	drop := changes{putImages: map[digest.Digest]*imageRecord{}}
	documents := map[digest.Digest]bool{}
	if err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(docsBucket).ForEach(func(k, data []byte) error {
			d := digest.Digest(k)
			documents[d] = isDocument(d, data)
			return nil
		})
	}); err != nil {
		return err
	}
	s.mu.RLock()
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		rec := s.images[id]
		for _, chain := range rec.Layers {
			if s.layers[chain] == nil {
				v.find(Finding{Kind: FoundImage, Image: id, What: fmt.Sprintf("has no layer %s", chain), Repaired: v.o.Repair})
				drop.deleteImages = append(drop.deleteImages, id)
			}
		}
		if slices.Contains(drop.deleteImages, id) {
			continue // what else is wrong with it goes with it
		}
		for _, d := range rec.Documents {
			if right, there := documents[d.Digest]; !right {
				what := map[bool]string{true: "has other content", false: "is missing"}[there]
				v.find(Finding{Kind: FoundImage, Image: id, Images: []digest.Digest{id}, What: fmt.Sprintf("document %s %s", d.Digest, what)})
				fresh := *rec
				fresh.Documents, fresh.Blobs = nil, nil // they come with the next pull; until then the image cannot be exported
				drop.putImages[id] = &fresh
			}
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(s.refs)) {
		id := s.refs[ref]
		if s.images[id] == nil {
			v.find(Finding{Kind: FoundReference, Reference: ref, Image: id, What: "leads to no image", Repaired: v.o.Repair})
		}
		if s.images[id] == nil || slices.Contains(drop.deleteImages, id) {
			drop.deleteRefs = append(drop.deleteRefs, ref)
		}
	}
	known := s.knownFiles()
	s.mu.RUnlock()
	used := s.usedDocs(&changes{})
	for _, d := range slices.Sorted(maps.Keys(documents)) {
		if !used[d] {
			v.find(Finding{Kind: FoundLeftover, Path: dbName, What: fmt.Sprintf("document %s belongs to nothing", quote(string(d))), Repaired: v.o.Repair})
			drop.sweepDocs = true
		}
	}
	for _, dir := range []string{layersDir, recordsDir, blobsDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if known[e.Name()] {
				continue
			}
			f := Finding{Kind: FoundLeftover, Path: filepath.Join(dir, e.Name()), What: "belongs to nothing"}
			if v.o.Repair {
				if err := s.trash(s.path(f.Path)); err != nil {
					f.Error = err.Error()
				}
				f.Repaired = f.Error == ""
			}
			v.find(f)
		}
	}
	if v.o.Repair && !drop.none() {
		return s.apply(drop)
	}
	return nil
}

// layer verifies one layer, which is held.
func (v *verification) layer(chain ChainID) error {
	s := v.s
	s.mu.RLock()
	rec := s.layers[chain]
	images := s.imagesOf(chain)
	s.mu.RUnlock()
	v.report.Layers++
	v.looked.Add(rec.layer(chain))
	v.report.Bytes = v.looked.Bytes
	found := 0
	tell := func(kind, path, what string) {
		if found++; found > findingsPerLayer {
			v.report.Omitted++
			return
		}
		v.find(Finding{Kind: kind, Layer: chain, Path: path, What: what, Images: images})
	}
	if rec.Damaged != "" {
		tell(FoundLayer, "", rec.Damaged)
		return nil
	}
	if err := v.blob(rec, tell); err != nil {
		return err
	}
	blobs := found
	root, err := s.openLayerAs(chain, rec)
	if errors.Is(err, errDamaged) {
		tell(FoundLayer, "", err.Error())
		return nil // it is marked
	}
	if err != nil {
		return err
	}
	defer root.Close()
	if rec.Tree == "" {
		v.report.Unverifiable = append(v.report.Unverifiable, chain)
		return nil
	}
	if err := v.tree(chain, rec, root, tell); err != nil {
		return err
	}
	if v.o.Deep && rec.Tape != "" && found == blobs {
		if err := v.tape(chain, rec, root, tell); err != nil {
			return err
		}
	}
	if found > blobs || found > 0 && v.o.Repair {
		last := v.report.Findings[len(v.report.Findings)-1]
		return s.markDamaged(chain, rec, strings.TrimSpace(quotePath(last.Path)+" "+last.What))
	}
	return nil
}

func quotePath(path string) string {
	if path == "" {
		return ""
	}
	return quote(path)
}

// blob verifies the compressed layer, if it is kept.
func (v *verification) blob(rec *layerRecord, tell func(kind, path, what string)) error {
	if rec.Blob == nil {
		return nil
	}
	f, why, err := v.s.openKept(v.ctx, rec.Blob, v.o.Deep)
	if why != "" {
		tell(FoundBlob, "", why)
	}
	if f == nil {
		return err
	}
	return f.Close()
}

// tree compares a layer's directory with its record.
func (v *verification) tree(chain ChainID, rec *layerRecord, root *os.File, tell func(kind, path, what string)) error {
	record, why := v.open(chain, rec, treeExt, rec.Tree)
	if record == nil {
		tell(FoundLayer, "", why)
		return nil
	}
	defer record.Close()
	err := compareTree(v.ctx, root, record, rec.Sums && v.o.Deep, func(path, what string) { tell(FoundLayer, path, what) })
	return v.judge(err, tell)
}

// tape makes a layer's archive again, and compares it with what the image's configuration says.
func (v *verification) tape(chain ChainID, rec *layerRecord, root *os.File, tell func(kind, path, what string)) error {
	record, why := v.open(chain, rec, tapeExt, rec.Tape)
	if record == nil {
		tell(FoundLayer, "", why)
		return nil
	}
	defer record.Close()
	hash := rec.Archive.Algorithm().Hash()
	right := true
	err := playTape(v.ctx, root, record, hash, func(e *damageError) {
		right = false
		tell(FoundLayer, e.path, e.what)
	})
	if err == nil && right && digest.NewDigest(rec.Archive.Algorithm(), hash) != rec.Archive {
		tell(FoundLayer, "", "made again it is not "+rec.Archive.String())
	}
	return v.judge(err, tell)
}

// judge makes findings of errors that are damage, and leaves the others.
func (v *verification) judge(err error, tell func(kind, path, what string)) error {
	if v.ctx.Err() != nil {
		return v.ctx.Err()
	}
	if err != nil && isDamage(err) {
		tell(FoundLayer, "", err.Error())
		return nil
	}
	return err
}

// open opens a record of a layer, if it is the one that was made.
func (v *verification) open(chain ChainID, rec *layerRecord, ext string, want digest.Digest) (f *os.File, why string) {
	f, err := os.Open(v.s.recordFile(chain, rec, ext))
	if err != nil {
		return nil, "its record cannot be opened: " + err.Error()
	}
	got, err := want.Algorithm().FromReader(f)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil || got != want {
		f.Close()
		return nil, "its record " + ext[1:] + " has other content"
	}
	return f, ""
}

// imagesOf returns the images that have a layer, sorted. The caller holds s.mu.
func (s *Store) imagesOf(chain ChainID) []digest.Digest {
	var ids []digest.Digest
	for id, rec := range s.images {
		if slices.Contains(rec.Layers, chain) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// repair pulls the images that have damaged layers, by digest, and says of each finding whether that mended it.
func (v *verification) repair() {
	errs := map[digest.Digest]error{}
	for i := range v.report.Findings {
		f := &v.report.Findings[i]
		if len(f.Images) == 0 || f.Repaired {
			continue
		}
		for _, id := range f.Images {
			if _, tried := errs[id]; !tried {
				errs[id] = v.s.pullAgain(v.ctx, id)
			}
		}
		v.s.mu.RLock()
		if f.Kind == FoundImage {
			rec := v.s.images[f.Image]
			f.Repaired = rec == nil || len(rec.Documents) > 0
		} else {
			f.Repaired = v.s.whole(f.Layer)
		}
		v.s.mu.RUnlock()
		if !f.Repaired {
			var all []error
			for _, id := range f.Images {
				all = append(all, errs[id])
			}
			if err := errors.Join(all...); err != nil {
				f.Error = err.Error()
			}
		}
	}
}

// pullAgain pulls an image by one of the digests that it is known by.
func (s *Store) pullAgain(ctx context.Context, id digest.Digest) error {
	s.mu.RLock()
	refs := s.refsOf(id)
	s.mu.RUnlock()
	var errs []error
	for _, ref := range refs {
		if !strings.Contains(ref, "@") {
			continue
		}
		img, err := s.Pull(ctx, ref, nil)
		if err == nil && img.ID == id {
			return nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return fmt.Errorf("image %s has no digest to pull it by; import it again: %w", id, errdefs.ErrFailedPrecondition)
	}
	return errors.Join(errs...)
}
