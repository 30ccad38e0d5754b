package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/internal/step"
)

// Bounds of what happens at a time. A layer under way takes about 3 MB, and the window of its frames where it is zstd.
const (
	layersOfPull   = 3  // so that one pull leaves something of the node's bound to others
	maxConnections = 32 // of all pulls to registries
)

// Deadlines of steps. A pull as a whole has none: its pace is watched instead.
const (
	shortStep = 10 * time.Minute
	longStep  = 24 * time.Hour
)

// pullKey tells pulls apart: by reference, and by who asks, so that nobody gets what another's credentials opened.
type pullKey struct {
	ref  string
	cred credentials
}

// Pull pulls an image and returns it once it is whole and durable. What is here already is not fetched again, but the
// registry is asked each time, so that tags are up to date and credentials are checked.
//
// It returns errdefs.ErrInvalidArgument for a bad reference, errdefs.ErrNotFound for an image that is not in the
// registry or not for this platform, ErrRegistryUnavailable where the registry cannot be reached, and the context's
// error as soon as the context ends.
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (*Image, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	named, err := parseReference(ref)
	if err != nil {
		return nil, err
	}
	cred, err := auth.parse()
	if err != nil {
		return nil, err
	}
	img, release, _, err := s.pulls.acquire(ctx, s.ctx, pullKey{named.String(), cred}, func(ctx context.Context) (*Image, error) {
		return s.pull(ctx, named, cred)
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("pull %s: %w", named, ctx.Err())
		}
		return nil, err
	}
	defer release()
	if own, err := s.Image(string(img.ID)); err == nil {
		return own, nil
	}
	return img, nil // removed meanwhile
}

// pull is one pull under way.
type pull struct {
	s       *Store
	named   reference.Named   // of a pull
	names   []reference.Named // that the image gets
	unknown bool              // nobody else knows it by the digest of its manifest
	src     origin
	pinned  bool
	docs    map[digest.Digest]keptDocument

	top      ocispec.Descriptor
	manifest digest.Digest
	id       digest.Digest
	artifact string // its type; "" for a container image
	config   []byte
	size     int64
	layers   []ocispec.Descriptor // as the manifest names them, and
	fetch    []ocispec.Descriptor // as they are fetched
	diffIDs  []digest.Digest
	chains   []ChainID
	parts    []part
	progress *pullProgress
	known    bool // the image is here
	again    bool // it was, and then it was removed: now it is pulled as if it were new, which holds its layers
	slots    slots
}

// errElsewhere says that an image is for other platforms only.
var errElsewhere = fmt.Errorf("no image for this platform: %w", errdefs.ErrNotFound)

// errRemoved says that what was here, and therefore not fetched, was removed, or found damaged, before the pull had ended.
var errRemoved = fmt.Errorf("what was here of the image was removed or damaged while it was pulled: %w", errdefs.ErrUnavailable)

// part is one layer of a pull: staged, or here already and held.
type part struct {
	staged  *stagedLayer
	own     bool // unpacked by this pull
	root    *os.File
	release func()
}

func (s *Store) pull(ctx context.Context, named reference.Named, cred credentials) (*Image, error) {
	progress := s.track.begin(named.String())
	defer s.track.end(progress)
	start := progress.started
	src, err := s.source(named, cred)
	if err != nil {
		s.track.failed.Add(1)
		return nil, err
	}
	defer src.close()
	p, img, err := s.attempt(ctx, "PullImage", named.String(), progress, func(p *pull) {
		p.named, p.names, p.src = named, []reference.Named{named}, src
	})
	if err != nil {
		err = p.explain(ctx, err)
		if img := s.localInstead(named, err); img != nil {
			s.track.pulled.Add(1)
			return img, nil
		}
		s.track.failed.Add(1)
		// Who called is told, and warns of it where nobody reads the error.
		s.log.Debug("pull failed", "image", named.String(), "error", err, "after", time.Since(start).Round(time.Millisecond))
		return nil, err
	}
	s.track.pulled.Add(1)
	s.log.Info("image pulled", "image", named.String(), "id", img.ID, "layers", len(p.chains), "compressed", p.size,
		"took", time.Since(start).Round(time.Millisecond))
	return img, nil
}

// attempts bounds how often a pull begins anew since what it found here was removed meanwhile, or found damaged.
const attempts = 5

// attempt runs a pull that set prepares, and again if what it found here is no more. It returns the pull as it ended, too.
func (s *Store) attempt(ctx context.Context, call, owner string, progress *pullProgress, set func(*pull)) (p *pull, img *Image, err error) {
	for try := range attempts {
		p = &pull{s: s, progress: progress, slots: newSlots(layersOfPull), again: try > 0}
		set(p)
		stack := &step.Stack{Call: call, Owner: owner, Observe: p.observe}
		img, err = p.run(ctx, stack)
		if err != nil {
			p.forgo(err)
			err = errors.Join(err, stack.Unwind(ctx))
		}
		p.releaseAll()
		// An image that was removed while its layers were held here left them for us to delete.
		if err := s.collectUnused(); err != nil {
			s.log.Warn("unused layers stay until the next removal", "error", err)
		}
		if !errors.Is(err, errRemoved) {
			break
		}
	}
	return p, img, err
}

// observe tells the end of a step.
func (p *pull) observe(e step.Event) {
	if p.s.observe == nil {
		return
	}
	if e.Err != nil {
		e.Err = errors.New(p.src.redact(e.Err.Error()))
	}
	p.s.observe(e)
}

// forgo gives up the layers of an image that the next try will not get, either, or of an import, for which they are at hand.
func (p *pull) forgo(err error) {
	if p.named != nil && !errors.Is(err, errImage) && !errdefs.IsResourceExhausted(err) {
		return
	}
	for i := range p.parts {
		if staged := p.parts[i].staged; staged != nil {
			staged.forgone.Store(true)
		}
	}
}

// localInstead returns the image that a reference means on this node, where the registry did not answer and the store is
// to make do with that.
func (s *Store) localInstead(named reference.Named, err error) *Image {
	if !s.local || !errors.Is(err, ErrRegistryUnavailable) {
		return nil
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	id, ok := s.refs[named.String()]
	if !ok {
		return nil
	}
	img, derr := s.describe(id, s.refsOf(id), s.users())
	if derr != nil {
		return nil
	}
	s.track.local.Add(1)
	s.log.Warn("registry unavailable, the image of this node is used instead", "image", named.String(), "id", id, "error", err)
	return img
}

// run does the steps. The layers are begun before it is known what their image is called, and the last two steps are
// not cut short: what they do is either done or not.
func (p *pull) run(ctx context.Context, stack *step.Stack) (*Image, error) {
	if err := stack.Run(ctx,
		step.Step{Name: "resolve", Timeout: shortStep, Do: p.resolve},
		step.Step{Name: "manifest", Timeout: shortStep, Do: p.documents},
	); err != nil {
		return nil, err
	}
	if !p.known {
		root, err := os.Open(p.s.root)
		if err != nil {
			return nil, err
		}
		defer root.Close()
		if err := p.s.space.begin(); err != nil {
			return nil, err
		}
		defer p.s.space.end()
		if err := stack.RunAll(ctx, p.layerSteps()...); err != nil {
			return nil, err
		}
		p.progress.set(PullFinishing)
		// Not left behind, since it works on descriptors that are closed after it.
		inherit := func(context.Context) error { return p.inherit(ctx) }
		if err := stack.Run(context.WithoutCancel(ctx), step.Step{Name: "inherit", Timeout: longStep, Do: inherit}); err != nil {
			return nil, err
		}
		if err := stack.Run(ctx, step.Step{Name: "sync", Timeout: shortStep, Do: func(context.Context) error { return p.sync(root) }}); err != nil {
			return nil, err
		}
	}
	p.progress.set(PullFinishing)
	p.s.change.Lock()
	defer p.s.change.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := stack.Run(context.WithoutCancel(ctx),
		step.Step{Name: "publish", Timeout: longStep, Do: p.publish, Undo: p.unpublish},
		step.Step{Name: "commit", Timeout: longStep, Do: p.commit},
	); err != nil {
		// Here and not later: nobody else may see the store between.
		return nil, errors.Join(err, stack.Unwind(ctx))
	}
	img, err := p.s.Image(string(p.id))
	if err != nil {
		return nil, err
	}
	return img, nil
}

// resolve asks the registry what the reference means today.
func (p *pull) resolve(ctx context.Context) error {
	desc, err := p.src.resolve(ctx)
	if err != nil {
		return err
	}
	if d, ok := p.named.(reference.Digested); ok && d.Digest() != desc.Digest {
		return badImage("the registry gives %s for it", desc.Digest)
	}
	if desc.MediaType == dockerSchema1 || desc.MediaType == dockerSchema1Sig {
		_, err := parseDocument(nil, dockerSchema1)
		return err
	}
	if err := checkDescriptor(desc, maxDocument); err != nil {
		return err
	}
	if !isIndexType(desc.MediaType) {
		// Some registries call everything application/json; the document's own media type is checked instead. The
		// fetcher asks for manifests only at a media type of a manifest.
		if !isManifestType(desc.MediaType) {
			desc.MediaType = ocispec.MediaTypeImageManifest
			p.top = desc
			p.top.ArtifactType = untyped
			return nil
		}
	}
	p.top = desc
	return nil
}

// untyped marks a descriptor whose media type was made up.
const untyped = "untyped"

// documents fetches the index, the manifest for this platform and the configuration.
func (p *pull) documents(ctx context.Context) error {
	if !p.again && p.recognise() {
		if p.known = p.s.onDisk(p.chains); p.known {
			return nil
		}
		p.chains = nil
	}
	w := &documentWalk{src: p.src, have: p.s.document, want: platforms.Only(nodePlatform())}
	found, err := w.find(ctx, p.top, 0)
	if err != nil {
		return err
	}
	if found == nil {
		return fmt.Errorf("it is not for %s, but for %v: %w", platforms.Format(nodePlatform()), w.present, errElsewhere)
	}
	p.docs = w.docs
	p.manifest, p.id, p.config = found.digest, found.manifest.Config.Digest, found.config
	p.layers, p.diffIDs, p.artifact = found.manifest.Layers, found.image.RootFS.DiffIDs, found.artifact
	if p.artifact != "" {
		p.id = found.digest // configurations of artifacts are often the same two bytes
	}
	p.size = found.manifest.Config.Size
	for i, l := range p.layers {
		if l.Size > p.s.bounds.bytes {
			return fmt.Errorf("layer %d of %d: layer %s: %d bytes compressed: %w", i+1, len(p.layers), l.Digest, l.Size, p.s.bounds.tooLarge())
		}
		p.size += l.Size
	}
	chain := identity.ChainIDs(append([]digest.Digest(nil), p.diffIDs...))
	for _, c := range chain {
		p.chains = append(p.chains, ChainID(c))
	}
	p.fetch = p.src.layers(p.layers, p.diffIDs)
	p.s.mu.RLock()
	known := !p.again && p.s.here(p.id)
	p.s.mu.RUnlock()
	p.known = known && p.s.onDisk(p.chains)
	return nil
}

// recognise knows a manifest or index that was pulled before, from whatever registry: then there is nothing to fetch.
func (p *pull) recognise() bool {
	s := p.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	for ref, id := range s.refs {
		if rec := s.images[id]; rec != nil && hasDigest(ref, p.top.Digest) && len(rec.Documents) > 0 && s.here(id) {
			p.id, p.config, p.size, p.chains, p.manifest, p.known = id, rec.Config, rec.Size, rec.Layers, rec.Manifest, true
			return true
		}
	}
	return false
}

func hasDigest(ref string, d digest.Digest) bool {
	n := len(ref) - len(d)
	return n > 0 && ref[n:] == string(d) && ref[n-1] == '@'
}

// layerSteps makes a step of each layer.
func (p *pull) layerSteps() []step.Step {
	p.parts = make([]part, len(p.chains))
	steps := make([]step.Step, len(p.chains))
	layers := make([]LayerStatus, len(p.chains))
	for i, l := range p.layers {
		layers[i] = LayerStatus{Digest: l.Digest, Size: l.Size, State: LayerWaiting}
	}
	p.progress.setLayers(p.chains, layers)
	for i := range p.chains {
		steps[i] = step.Step{
			Name: fmt.Sprintf("layer-%d", i+1), Timeout: longStep,
			Do:   func(ctx context.Context) error { return p.layer(ctx, i) },
			Undo: func(context.Context) error { p.release(i); return nil },
		}
	}
	return steps
}

// layer gets one layer: it is here, somebody is at it, or it is fetched and unpacked.
func (p *pull) layer(ctx context.Context, i int) error {
	chain := p.chains[i]
	// Held before anything else: from here on, should another pull record the layer and its image be removed at once,
	// the layer stays.
	there := p.s.reserve(chain)
	for {
		if there {
			root, err := p.s.openLayer(chain)
			if errors.Is(err, errDamaged) {
				there = false
				continue
			}
			if err != nil {
				p.s.unhold(chain)
				return err
			}
			p.parts[i] = part{root: root, release: func() { root.Close(); p.s.unhold(chain) }}
			p.progress.setLayer(i, LayerPresent)
			return nil
		}
		staged, release, own, err := p.s.unpacks.acquire(ctx, p.s.ctx, chain, func(ctx context.Context) (*stagedLayer, error) {
			if err := p.slots.take(ctx); err != nil {
				return nil, err
			}
			defer p.slots.give()
			if err := p.s.layersAtOnce.take(ctx); err != nil {
				return nil, err
			}
			defer p.s.layersAtOnce.give()
			progress, ended := p.s.track.layer(chain)
			defer ended()
			return p.s.unpack(ctx, p.src, p.fetch[i], p.diffIDs[i], chain, p.artifact != "", progress)
		})
		if err == nil {
			// Let go of in this order: whoever finds the staged layer must find it held.
			p.parts[i] = part{staged: staged, own: own, root: staged.root, release: func() { release(); p.s.unhold(chain) }}
			p.progress.setLayer(i, LayerUnpacked)
			return nil
		}
		if own || ctx.Err() != nil {
			p.s.unhold(chain)
			return fmt.Errorf("layer %d of %d: %w", i+1, len(p.chains), err)
		}
		// Another pull's try failed, perhaps for reasons of its own: its registry, its credentials.
		p.s.mu.RLock()
		there = p.s.whole(chain)
		p.s.mu.RUnlock()
	}
}

func (p *pull) release(i int) {
	if r := p.parts[i].release; r != nil {
		p.parts[i].release = nil
		r()
	}
}

func (p *pull) releaseAll() {
	for i := range p.parts {
		p.release(i)
	}
}

// seal records what the layers' directories are like.
func (p *pull) seal(ctx context.Context) error {
	errs := make([]error, len(p.parts))
	var layers sync.WaitGroup
	for i, part := range p.parts {
		if part.staged == nil {
			continue
		}
		layers.Go(func() {
			if err := part.staged.seal(ctx); err != nil {
				errs[i] = fmt.Errorf("layer %d: %w", i+1, err)
			}
		})
	}
	layers.Wait()
	return errors.Join(errs...)
}

// inherit gives directories that a layer has no entry for the attributes that they have below it: the only thing for
// which a layer needs those below. If ctx ends before all is done, another pull that shares a layer goes on with it.
func (p *pull) inherit(ctx context.Context) error {
	for i, part := range p.parts {
		if part.staged == nil {
			continue
		}
		var below []*os.File
		for j := i - 1; j >= 0 && !part.staged.rec.Opaque; j-- {
			below = append(below, p.parts[j].root)
		}
		if err := part.staged.inherit(ctx, below); err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	return p.seal(ctx)
}

// sync makes everything unpacked durable, in one go for all layers. The kernel tells that something could not be written
// once to each open file, so root is this pull's own, opened before anything was written. What another pull has unpacked may
// have been lost before that.
func (p *pull) sync(root *os.File) error {
	err := syncfs(root)
	for i := range p.parts {
		if part := &p.parts[i]; err == nil && part.staged != nil && !part.own {
			err = part.staged.flush()
		}
	}
	if err == nil {
		return nil
	}
	for i := range p.parts {
		if staged := p.parts[i].staged; staged != nil {
			staged.lost.Store(true)
		}
	}
	return fmt.Errorf("not all layers could be written: %w", err)
}

// publish renames the staged layers into place. Nothing refers to them yet.
func (p *pull) publish(context.Context) error {
	renamed, blobs := false, map[digest.Digest]bool{}
	for i, part := range p.parts {
		if part.staged == nil || part.staged.published {
			continue
		}
		p.s.mu.RLock()
		there := p.s.whole(p.chains[i])
		p.s.mu.RUnlock()
		if there {
			continue // another pull was first
		}
		if err := p.s.place(part.staged, blobs); err != nil {
			return err
		}
		renamed = true
	}
	if !renamed {
		return nil
	}
	return p.s.syncPlaces()
}

// unpublish takes back what publish put in place and commit did not record. Another pull may still want it.
func (p *pull) unpublish(context.Context) error {
	var errs []error
	for i, part := range p.parts {
		if part.staged == nil || !part.staged.published {
			continue
		}
		p.s.mu.RLock()
		recorded := p.s.whole(p.chains[i])
		p.s.mu.RUnlock()
		if recorded {
			continue
		}
		errs = append(errs, p.s.unplace(part.staged))
	}
	return errors.Join(errs...)
}

// commit makes the image visible: one transaction.
func (p *pull) commit(context.Context) error {
	s := p.s
	c := changes{
		putImages: map[digest.Digest]*imageRecord{}, putRefs: map[string]digest.Digest{}, putLayers: map[ChainID]*layerRecord{},
		putDocs: map[digest.Digest][]byte{},
	}
	s.mu.RLock()
	had := s.images[p.id]
	gone := had == nil && p.known
	for i, chain := range p.chains {
		if s.whole(chain) {
			continue
		}
		if i >= len(p.parts) || p.parts[i].staged == nil {
			gone = true
			break
		}
		rec := p.parts[i].staged.rec
		c.putLayers[chain] = &rec
	}
	c.putImages[p.id] = p.record(had)
	s.mu.RUnlock()
	if gone {
		return errRemoved
	}
	for d, doc := range p.docs {
		c.putDocs[d] = doc.data
	}
	for _, ref := range p.references() {
		c.putRefs[ref] = p.id
	}
	return s.replace(c)
}

// record is the image's record, with what one that is there already knows.
func (p *pull) record(had *imageRecord) *imageRecord {
	rec := &imageRecord{Manifest: p.manifest, Config: json.RawMessage(p.config), Layers: p.chains, Size: p.size, Artifact: p.artifact}
	if had != nil {
		*rec = *had
		rec.Documents = slices.Clone(had.Documents)
	}
	if len(rec.Blobs) == 0 {
		rec.Manifest = p.manifest
		for _, d := range p.layers {
			rec.Blobs = append(rec.Blobs, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
		}
	}
	for _, doc := range p.docs {
		if !slices.ContainsFunc(rec.Documents, func(d ocispec.Descriptor) bool { return d.Digest == doc.desc.Digest }) {
			rec.Documents = append(rec.Documents, doc.desc)
		}
	}
	rec.Pinned = rec.Pinned || p.pinned
	return rec
}

// references are the names that the image has from this pull: the tag, unless a digest was asked for, and the digest.
func (p *pull) references() []string {
	var refs []string
	for _, named := range p.names {
		repo := reference.TrimNamed(named)
		if tagged, ok := named.(reference.Tagged); ok {
			refs = append(refs, repo.Name()+":"+tagged.Tag())
		}
		if !p.unknown {
			refs = append(refs, repo.Name()+"@"+p.top.Digest.String())
		}
	}
	return refs
}
