// Package cri is the gRPC service of berth: the Container Runtime Interface, v1 of k8s.io/cri-api 0.37, as kubelet,
// crictl and critest use it.
//
// It only translates. Each call validates its request, looks up what it names, asks one package (cri/pods, images,
// network, cri/streaming) and turns the answer or the error into CRI's. Nothing of a pod or an image is kept here.
//
// It promises:
//   - a malformed request is refused with InvalidArgument naming field and value before anything is touched;
//   - unknown ids are NotFound, except where the interface says that the call succeeds: to stop or remove what is not
//     there, and to ask for the status of an absent image;
//   - an id may be shortened to any prefix that is unique;
//   - errors become gRPC codes in one place, errors.go;
//   - a panic in one call fails that call and no other.
//
// It does not implement checkpoints: their three calls answer Unimplemented.
//
//	srv := cri.New(cri.Options{Pods: p, Images: i, Network: n, Streaming: s, Log: log})
//	l, err := socket.Listen(ctx, "/run/berth/berth.sock")
//	err = srv.Serve(ctx, l) // until ctx ends
package cri
