// Package podview tells what a program sees of the container it is in, and how that differs between runtimes. What a pod
// sees is an interface: programs depend on limits, mounts, capabilities and devices without anybody having promised them,
// so that no release of berth changes them unseen.
//
// Script prints the view, a fact a line; Normalise takes out what is another's at each run. The views of berth and of
// containerd on one machine lie in testdata, for three kinds of pods; testdata/differences.txt explains each line that only
// one of the two has. integration.TestPodView compares what berth shows today with its file.
package podview
