package credentials

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/distribution/reference"

	"github.com/berth-run/berth/images/admin"
)

// maxFile bounds a file of credentials.
const maxFile = 1 << 20

// Pair reads USER:PASSWORD, one line, from a file, or from stdin if it is called "-".
func Pair(file string, stdin io.Reader) (*admin.Auth, error) {
	data, err := read(file, stdin)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	line := strings.TrimRight(string(data), "\r\n")
	user, password, ok := strings.Cut(line, ":")
	if !ok || user == "" || password == "" || strings.ContainsAny(line, "\r\n") {
		return nil, fmt.Errorf("credentials: %s is not one line USER:PASSWORD", file)
	}
	return &admin.Auth{Username: user, Password: password}, nil
}

// entry is one of Docker's configuration file.
type entry struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"` // base64 of USER:PASSWORD
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// Docker reads the credentials for an image from a file in the format of Docker's config.json, or from stdin if it is
// called "-": those of the longest entry that the image's name begins with, as the kubelet chooses. They are nil where the
// file has none for it; from says which entry they are from.
func Docker(file string, stdin io.Reader, image string) (auth *admin.Auth, from string, err error) {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return nil, "", fmt.Errorf("image %q: %w", image, err)
	}
	data, err := read(file, stdin)
	if err != nil {
		return nil, "", fmt.Errorf("credentials: %w", err)
	}
	var config struct {
		Auths       map[string]entry  `json:"auths"`
		CredsStore  string            `json:"credsStore"`
		CredHelpers map[string]string `json:"credHelpers"`
	}
	if err := json.Unmarshal(data, &config); err != nil {
		// Not the decoder's words: they may hold a piece of a password.
		return nil, "", fmt.Errorf("credentials: %s is not in the format of Docker's config.json", file)
	}
	best := ""
	for key := range config.Auths {
		if prefix := canonical(key); within(named.Name(), prefix) && (from == "" || len(prefix) > len(best) || len(prefix) == len(best) && key < from) {
			best, from = prefix, key
		}
	}
	if from != "" {
		if auth, err = config.Auths[from].auth(); err != nil {
			return nil, "", fmt.Errorf("credentials: %s: entry %q: %w", file, from, err)
		}
	}
	helped := config.CredsStore != "" || config.CredHelpers[reference.Domain(named)] != ""
	if auth == nil && helped {
		return nil, "", fmt.Errorf("credentials: %s leaves those for %s to a credential helper, which is not run: give them by --creds-file", file, reference.Domain(named))
	}
	return auth, from, nil
}

func (e entry) auth() (*admin.Auth, error) {
	a := &admin.Auth{Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if e.Auth != "" && a.Password == "" {
		raw, err := base64.StdEncoding.DecodeString(e.Auth)
		user, password, ok := strings.Cut(strings.TrimRight(string(raw), "\x00"), ":")
		if err != nil || !ok {
			return nil, errors.New("auth is not USER:PASSWORD in base64")
		}
		a.Username, a.Password = user, password
	}
	if a.Password == "" && a.IdentityToken == "" && a.RegistryToken == "" {
		return nil, nil // an entry without any is how Docker notes that a helper has them
	}
	return a, nil
}

// canonical makes the beginning of a normalised image name of an entry's key, which may be a URL.
func canonical(key string) string {
	_, rest, ok := strings.Cut(key, "://")
	if !ok {
		rest = key
	}
	host, path, _ := strings.Cut(strings.TrimRight(rest, "/"), "/")
	switch host {
	case "index.docker.io", "registry-1.docker.io":
		host = "docker.io"
	}
	if path == "v1" || path == "v2" { // of the registry's interface, not of an image
		path = ""
	}
	if path != "" {
		host += "/" + path
	}
	return host
}

func within(name, prefix string) bool {
	return name == prefix || strings.HasPrefix(name, prefix+"/")
}

func read(file string, stdin io.Reader) ([]byte, error) {
	from := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		from = f
	}
	data, err := io.ReadAll(io.LimitReader(from, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s has more than %d bytes", file, maxFile)
	}
	return data, nil
}
