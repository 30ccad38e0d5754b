package cri

import (
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

// SandboxImage is the image that a sandbox is said to have. It has none, but whoever reads metrics takes a series without
// one for that of a cgroup that is no container.
const SandboxImage = "berth-shim"

// ImageLabel names the image of a container for people: by a tag where it has one.
func ImageLabel(store *images.Store, c *pods.Container) string {
	if img, err := store.Image(c.ImageID); err == nil {
		for _, names := range [][]string{img.RepoTags, img.RepoDigests} {
			if len(names) > 0 {
				return names[0]
			}
		}
	}
	if name := c.Config.GetImage().GetUserSpecifiedImage(); name != "" { // the image is gone, the container is not
		return name
	}
	return c.ImageRef
}
