package testimages

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
)

//go:embed *.go
var sources embed.FS

// Fingerprint changes when the images that this package makes may: it is the hash of its own source.
func Fingerprint() (string, error) {
	files, err := sources.ReadDir(".")
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, f := range files {
		data, err := sources.ReadFile(f.Name())
		if err != nil {
			return "", err
		}
		_, _ = fmt.Fprintf(h, "%s %d\n", f.Name(), len(data))
		_, _ = h.Write(data)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}
