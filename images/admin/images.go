package admin

import (
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/images"
)

// Image is an image as tools see it.
type Image struct {
	ID          digest.Digest `json:"id"`
	RepoTags    []string      `json:"repoTags"`
	RepoDigests []string      `json:"repoDigests"`
	// Compressed is the size of what was fetched, in bytes.
	Compressed int64 `json:"compressedBytes"`
	// Unpacked is what the layers take on disk, those shared with other images included; Unique is what they take that no
	// other image has.
	Unpacked uint64 `json:"unpackedBytes"`
	Unique   uint64 `json:"uniqueBytes"`
	Pinned   bool   `json:"pinned"`
	// Artifact is the type of an OCI artifact, which can be mounted but not run; "" for a container image.
	Artifact string     `json:"artifact,omitempty"`
	Created  *time.Time `json:"created,omitempty"`
	Platform string     `json:"platform"`
	// Containers are the ids of those that are made of it.
	Containers []string `json:"containers"`
	// Volumes are where it is mounted as an image volume.
	Volumes []string `json:"volumes"`
}

// List is the answer of Images.
type List struct {
	Images []Image `json:"images"`
}

// Detail is all that is known of an image.
type Detail struct {
	Image
	Layers []LayerDetail `json:"layers"` // bottom first
	Config ocispec.Image `json:"config"`
}

// LayerDetail is one layer of an image.
type LayerDetail struct {
	ChainID images.ChainID `json:"chainID"`
	DiffID  digest.Digest  `json:"diffID"`
	Bytes   uint64         `json:"bytes"`
	Inodes  uint64         `json:"inodes"`
	Kept    uint64         `json:"keptBytes,omitempty"` // that the compressed layer takes beside, if that is kept
	Images  int            `json:"images"`              // how many have it
}

// Usage is what the store takes on disk.
type Usage struct {
	Root string `json:"root"`
	// Layers, their bytes and inodes; Freeable is what goes when all images go that are neither in use nor pinned.
	Layers   int    `json:"layers"`
	Bytes    uint64 `json:"bytes"`
	Inodes   uint64 `json:"inodes"`
	Freeable uint64 `json:"freeableBytes"`
	// Containers and what they have written, as last counted, to a directory that may be on another file system.
	Containers    int     `json:"containers"`
	WritableRoot  string  `json:"writableRoot"`
	WritableBytes uint64  `json:"writableBytes"`
	Images        []Image `json:"images"`
}

// Names is a request about images.
type Names struct {
	Names []string `json:"names"`
	// Force removes what is pinned or in use, too.
	Force bool `json:"force,omitempty"`
}

// Outcome tells of one name, what became of it.
type Outcome struct {
	Name  string        `json:"name"`
	ID    digest.Digest `json:"id,omitempty"`
	Error *Error        `json:"error,omitempty"`
}

// Removal is the answer of Remove.
type Removal struct {
	Removed []Outcome `json:"removed"`
}

// Pins is a request to pin images, or to unpin them.
type Pins struct {
	Names  []string `json:"names"`
	Pinned bool     `json:"pinned"`
}

// Pinned is the answer of Pin.
type Pinned struct {
	Images []Outcome `json:"images"`
}

// seen is the store's layers at one moment, to describe images with.
type seen map[images.ChainID]images.Layer

func (s *Server) see() seen {
	layers := seen{}
	for _, l := range s.store.Layers() {
		layers[l.ID] = l
	}
	return layers
}

func (s *Server) describe(img *images.Image, layers seen) Image {
	out := Image{
		ID: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Compressed: img.Size, Unique: img.Own, Pinned: img.Pinned,
		Artifact: img.Artifact,
		Created:  img.Config.Created, Platform: img.Config.OS + "/" + img.Config.Architecture,
	}
	if img.Config.Variant != "" {
		out.Platform += "/" + img.Config.Variant
	}
	var takes images.Tally
	for _, chain := range img.Layers {
		takes.Add(layers[chain])
	}
	out.Unpacked = takes.Bytes
	out.Containers, out.Volumes = s.store.Users(img.ID)
	for _, list := range []*[]string{&out.RepoTags, &out.RepoDigests, &out.Containers, &out.Volumes} {
		if *list == nil {
			*list = []string{} // [] in JSON, not null
		}
	}
	return out
}

func (s *Server) all() []Image {
	layers, list := s.see(), []Image{}
	for _, img := range s.store.Images() {
		list = append(list, s.describe(img, layers))
	}
	return list
}

func (s *Server) images(w http.ResponseWriter, _ *http.Request) error {
	reply(w, http.StatusOK, List{s.all()})
	return nil
}

func (s *Server) inspect(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Names](w, r)
	if err != nil {
		return err
	}
	if len(req.Names) != 1 {
		return invalid("names: one is wanted, %d are given", len(req.Names))
	}
	img, err := s.store.Image(req.Names[0])
	if err != nil {
		return err
	}
	layers := s.see()
	d := Detail{Image: s.describe(img, layers), Layers: []LayerDetail{}, Config: img.Config}
	for _, chain := range img.Layers {
		l := layers[chain]
		d.Layers = append(d.Layers, LayerDetail{ChainID: chain, DiffID: l.DiffID, Bytes: l.Bytes, Inodes: l.Inodes, Kept: l.Kept, Images: len(l.Images)})
	}
	reply(w, http.StatusOK, d)
	return nil
}

func (s *Server) du(w http.ResponseWriter, _ *http.Request) error {
	total := s.store.Usage()
	u := Usage{Root: total.Mountpoint, Bytes: total.Bytes, Inodes: total.Inodes, Images: s.all()}
	needed := map[digest.Digest]bool{}
	for _, img := range u.Images {
		needed[img.ID] = img.Pinned
	}
	stays := func(l images.Layer) bool {
		return l.Held || slices.ContainsFunc(l.Images, func(id digest.Digest) bool { return needed[id] })
	}
	layers := s.store.Layers()
	u.Layers = len(layers)
	var goes images.Tally
	for _, l := range layers {
		if stays(l) {
			goes.Without(l)
		}
	}
	for _, l := range layers {
		if !stays(l) {
			goes.Add(l)
		}
	}
	u.Freeable = goes.Bytes
	written := s.store.WritablesUsage()
	u.Containers, u.WritableRoot, u.WritableBytes = len(s.store.Keys()), written.Mountpoint, written.Bytes
	reply(w, http.StatusOK, u)
	return nil
}

func (s *Server) remove(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Names](w, r)
	if err != nil {
		return err
	}
	outcomes, err := each(req.Names, func(name string) (digest.Digest, error) { return s.removeOne(r, name, req.Force) })
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, Removal{outcomes})
	return nil
}

func (s *Server) pin(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Pins](w, r)
	if err != nil {
		return err
	}
	outcomes, err := each(req.Names, func(name string) (digest.Digest, error) {
		return s.store.SetPinned(r.Context(), name, req.Pinned)
	})
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, Pinned{outcomes})
	return nil
}

// each does something to images one by one, and says of each what became of it.
func each(names []string, do func(name string) (digest.Digest, error)) ([]Outcome, error) {
	if len(names) == 0 {
		return nil, invalid("names: none is given")
	}
	outcomes := []Outcome{}
	for _, name := range names {
		one, err := Outcome{Name: name}, error(nil)
		if one.ID, err = do(name); err != nil {
			one.Error, _ = wire(err)
		}
		outcomes = append(outcomes, one)
	}
	return outcomes, nil
}

// removeOne removes an image, also one that is damaged, and refuses what a container needs or what is pinned. A container
// that is made in the same instant loses nothing: its layers stay until it goes. The kubelet, which removes images by the
// CRI, is not asked to force anything.
func (s *Server) removeOne(r *http.Request, name string, force bool) (digest.Digest, error) {
	img, err := s.store.Known(name)
	if err != nil {
		return "", err
	}
	if !force {
		containers, volumes := s.store.Users(img.ID)
		switch {
		case len(containers) > 0:
			return img.ID, fmt.Errorf("image %s is in use by %s: remove that first, or give --force: its layers stay until then: %w", name, several("container", containers), errInUse)
		case len(volumes) > 0:
			return img.ID, fmt.Errorf("image %s is in use by %s: remove its pod first, or give --force: its layers stay until then: %w", name, several("the volume at", volumes), errInUse)
		case img.Pinned:
			return img.ID, fmt.Errorf("image %s is pinned: give --force to remove it all the same: %w", name, errInUse)
		}
	}
	return img.ID, s.store.Remove(r.Context(), string(img.ID))
}

// several names the first of a list, and how many more there are.
func several(what string, list []string) string {
	first := list[0]
	if len(first) == 64 { // an id; people know them by their first digits
		first = first[:13]
	}
	if len(list) == 1 {
		return what + " " + first
	}
	return fmt.Sprintf("%s %s and %d more", what, first, len(list)-1)
}
