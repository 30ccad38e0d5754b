// Package version says which berth this is. The linker stamps it:
//
//	go build -ldflags "-X github.com/berth-run/berth/internal/version.Version=1.2.3
//		-X github.com/berth-run/berth/internal/version.Commit=0123abcd" ./cmd/berth
//
// It imports nothing, since the shim pays for every package once per pod.
package version

var (
	// Version of this build, as semantic versioning writes it.
	Version = "0.0.0-dev"
	// Commit that it was built from; empty where the build did not say.
	Commit = ""
)

// String is the version and, where it is known, the commit.
func String() string {
	if Commit == "" {
		return Version
	}
	return Version + " (" + Commit + ")"
}
