// Package imagestest helps tests that need images and registries, friendly and hostile ones: builders of layers and
// images, a registry in process with switches for everything that a registry may do wrong, a corpus of layers that try
// to get out of their directory, and a hash over a tree by which a test sees that nothing outside changed.
//
//	reg := imagestest.NewRegistry(t)
//	img := imagestest.NewImage(imagestest.Layer(imagestest.File("etc/motd", "hello\n")))
//	reg.Push("team/app", "v1", img)
//	store.Pull(ctx, reg.Host()+"/team/app:v1", nil)
package imagestest
