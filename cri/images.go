package cri

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images"
)

// PullImage pulls, and answers the image's id, by which all other calls name it, too. It goes on until its caller gives up.
func (s *Server) PullImage(ctx context.Context, req *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	name, err := imageName(req.GetImage())
	if err != nil {
		return nil, err
	}
	if err := s.checkHandler("image.runtime_handler", req.GetImage().GetRuntimeHandler()); err != nil {
		return nil, err
	}
	// The one credential that goes into a header as it is; the text of the error that comes of it is a registry's.
	if token := req.GetAuth().GetRegistryToken(); strings.ContainsFunc(token, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return nil, fmt.Errorf("auth.registry_token: holds control characters: %w", errdefs.ErrInvalidArgument)
	}
	img, err := s.images.Pull(ctx, name, auth(req.GetAuth()))
	if err != nil {
		return nil, pullError(err)
	}
	return &cri.PullImageResponse{ImageRef: img.ID.String()}, nil
}

// ListImages lists from memory. A filter names one image.
func (s *Server) ListImages(_ context.Context, req *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	list, err := s.imagesOf(req.GetFilter())
	if err != nil {
		return nil, err
	}
	resp := &cri.ListImagesResponse{}
	for _, img := range list {
		resp.Images = append(resp.Images, image(img))
	}
	return resp, nil
}

// imagesOf is the images that a filter picks: all, the one that it names, or none where that is not there.
func (s *Server) imagesOf(filter *cri.ImageFilter) ([]*images.Image, error) {
	if filter.GetImage().GetImage() == "" {
		return s.images.Images(), nil
	}
	name, err := imageName(filter.GetImage())
	if err != nil {
		return nil, err
	}
	img, err := s.images.Image(name)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return []*images.Image{img}, nil
}

// ImageStatus tells what is known of an image. That it is absent is an answer without an image, not an error.
func (s *Server) ImageStatus(_ context.Context, req *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	name, err := imageName(req.GetImage())
	if err != nil {
		return nil, err
	}
	img, err := s.images.Image(name)
	if errors.Is(err, errdefs.ErrNotFound) {
		return &cri.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &cri.ImageStatusResponse{Image: image(img)}
	if req.GetVerbose() {
		if resp.Info, err = info(newImageInfo(img)); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// RemoveImage removes an image and all that refers to it. It succeeds for one that is absent.
func (s *Server) RemoveImage(ctx context.Context, req *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	name, err := imageName(req.GetImage())
	if err != nil {
		return nil, err
	}
	if err := s.images.Remove(ctx, name); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return nil, err
	}
	return &cri.RemoveImageResponse{}, nil
}

// ImageFsInfo tells how much the images take, and how much containers have written, which may be on another file system. It
// is part of the handshake of every client.
func (s *Server) ImageFsInfo(context.Context, *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	now := time.Now()
	return &cri.ImageFsInfoResponse{
		ImageFilesystems:     []*cri.FilesystemUsage{filesystemUsage(s.images.Usage(), now)},
		ContainerFilesystems: []*cri.FilesystemUsage{filesystemUsage(s.images.WritablesUsage(), now)},
	}, nil
}

// imageName is the name of the image that a request is about.
func imageName(spec *cri.ImageSpec) (string, error) {
	name := spec.GetImage()
	if name == "" {
		return "", missing("image.image")
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return "", invalid("image.image", name, "a reference holds no blanks and no control characters")
	}
	if len(name) > maxID {
		return "", invalid("image.image", name, "a reference holds %d bytes at most", maxID)
	}
	return name, nil
}

// auth is nil where a request holds no credentials, which is also how the kubelet sends an empty one.
func auth(a *cri.AuthConfig) *images.Auth {
	out := images.Auth{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(), ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
	if out == (images.Auth{}) {
		return nil
	}
	return &out
}

func image(img *images.Image) *cri.Image {
	out := &cri.Image{
		Id:          img.ID.String(),
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        promise(img),
		Spec:        &cri.ImageSpec{Image: img.ID.String()},
		Pinned:      img.Pinned,
	}
	out.Uid, out.Username = imageUser(img.Config.Config.User)
	return out
}

// promise is an image's size: of its compressed layers, as other runtimes tell it and registries know it, but no more than
// its removal gives back, since the kubelet's garbage collection adds sizes up until it has what it needs. It refuses a size
// of 0.
func promise(img *images.Image) uint64 {
	return max(min(uint64(max(img.Size, 0)), img.Own), 1)
}

// imageUser splits the user of an image's configuration as the kubelet wants it for runAsNonRoot: a number, or a name, or
// neither where none is set. What does not fit into a number is told as it is; a container of it is refused later
// (CVE-2024-40635), it must not look like no user at all here, which would mean root.
func imageUser(user string) (*cri.Int64Value, string) {
	name, _, _ := strings.Cut(user, ":")
	if name == "" {
		return nil, ""
	}
	if uid, err := strconv.ParseInt(name, 10, 64); err == nil {
		return &cri.Int64Value{Value: uid}, ""
	}
	return nil, name
}

// imageInfo is what a verbose status of an image adds; field names are containerd's.
type imageInfo struct {
	ChainID   string        `json:"chainID,omitempty"`
	ImageSpec ocispec.Image `json:"imageSpec"`
	// ArtifactType is berth's own: what an image that cannot be run is.
	ArtifactType string `json:"artifactType,omitempty"`
}

func newImageInfo(img *images.Image) *imageInfo {
	i := &imageInfo{ImageSpec: img.Config, ArtifactType: img.Artifact}
	if n := len(img.Layers); n > 0 {
		i.ChainID = string(img.Layers[n-1])
	}
	return i
}
