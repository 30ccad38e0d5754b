// Package images pulls container images, keeps them, and mounts them as root file systems.
//
// It promises:
//   - an image is visible only when it is whole and durable: every digest and size was verified while the bytes
//     streamed, everything unpacked was flushed by one syncfs, and one bbolt transaction made it appear. A process killed
//     at any step of a pull, or a power cut, leaves the image as it was before, and [Open] sweeps the rest;
//   - a layer is unpacked once, into a directory named after its chain ID, in a staging directory of mode 0700 that
//     nobody else can enter, and renamed into place. The layers of an image are fetched and unpacked side by side: overlay
//     does not need a layer's parents to unpack it;
//   - a download that breaks off goes on where it was, at the next mirror if there is one; a registry that is busy is asked
//     again, later; one that sends too slowly over half a minute, or next to nothing each time, is given up;
//   - all pulls of a node together have so many layers under way, so many connections, and so much memory. The stages of one
//     layer (fetch, decompress, hash, unpack) run side by side;
//   - pulls of one reference with the same credentials are one pull, and unpacks of one layer are one unpack, whoever
//     asks; a caller who gives up gets its context's error at once, and the work ends when nobody waits for it any more;
//   - a pull that failed, or was cancelled, is not in vain: the layers that were whole wait for the next one for some minutes,
//     if there is space. A tenth of what is free is left, of bytes and inodes, whatever layers come to together;
//   - credentials go to the registry that they are for, and to token servers on that host or listed for it; never to
//     mirrors, redirect targets or foreign token realms;
//   - reads ([Store.Image], [Store.Images], [Store.Usage]) come from memory and wait for no pull;
//   - a layer that a prepared root file system uses stays until [Store.Release], whatever happens to its image;
//   - damage is found ([Store.Verify], and on mounting) and mended by the next pull, which fetches just the layer that is
//     damaged. Until then its images are not listed, so that a kubelet does pull them;
//   - the loss of the database costs what was pulled, not what runs: [Open] goes on with what can be read of it, or with
//     nothing, and leaves alone the layers that something is mounted from;
//   - what is exported on one node and imported on another ([Store.Export], [Store.Import]) is the same image, also by the
//     digests that pods name. An archive is trusted no more than a registry.
//
// It does not keep the compressed blobs, unless asked to (Options.KeepBlobs): they are dropped while they are unpacked, so an
// image needs only the space of its unpacked layers. Exports make the archives again from the layers. It does not sign-check, decrypt, lazily load or convert
// images, and it does not know Kubernetes: who may use which image is for the caller to decide.
//
// On disk, below Options.Root (mode 0700 whatever the umask):
//
//	meta.db              images, references and layers, indexes, manifests and configurations (bbolt)
//	meta.db.broken       the last one that was damaged, and made anew of what could be read of it
//	layers/ALG-HEX/      unpacked layers, named by chain ID, in overlayfs's own form (whiteouts, opaque marks); .N for those
//	                     that took a damaged one's place
//	records/ALG-HEX.tree what a layer's directory is like, to compare it with
//	records/ALG-HEX.tape a layer's archive without the contents that its directory has, to make it again
//	blobs/ALG-HEX        compressed layers, by digest, where they are kept
//	rootfs/KEY/          record.json, upper, work: one prepared root file system; no fsync, since it dies with its container
//	views/HASH/          record.json: one read-only view, so that its layers stay
//	tmp/ trash/          work under way; what is to be deleted. Both are emptied by Open and in the background
//
// With Options.Writable rootfs is a link to a directory of that name there, which has a tmp and a trash beside it.
//
// Example:
//
//	store, err := images.Open(images.Options{Root: "/var/lib/berth/images", CertsD: "/etc/berth/certs.d", Log: log})
//	...
//	img, err := store.Pull(ctx, "registry.k8s.io/pause:3.10", nil)
//	err = store.Prepare(id, img.ID, nil)
//	err = store.Mount(ctx, id, "/run/berth/containers/"+id+"/rootfs")
package images
