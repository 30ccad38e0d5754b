package nri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/berth-run/berth/internal/socket"
)

// place is where plugins connect. The library removes whatever is at the path that it is given, and gives the file the mode
// of the umask. So it is given a path in a directory that nobody else can enter, and the file is moved from there to where
// plugins look for it once it is as it should be.
type place struct {
	path    string
	private string // directory that the library makes its socket in
	ours    bool   // it was made
	file    socket.File
}

func newPlace(path string) (*place, error) {
	p := &place{path: path, private: filepath.Join(filepath.Dir(path), ".berth."+filepath.Base(path))}
	for _, path := range []string{path, p.libraryPath()} {
		if err := socket.CheckPath(path); err != nil {
			return nil, fmt.Errorf("nri: socket %s: %w", path, err)
		}
	}
	return p, nil
}

// libraryPath is what the library is told to listen on.
func (p *place) libraryPath() string { return filepath.Join(p.private, "s") }

// prepare makes the private directory, unless somebody listens where plugins would look for us.
func (p *place) prepare() error {
	err := socket.Prepare(context.Background(), p.path)
	if err == nil {
		err = os.RemoveAll(p.private) // of a daemon that was killed
	}
	if err == nil {
		err = os.Mkdir(p.private, 0o700)
	}
	p.ours = err == nil
	return p.failed(err)
}

// publish moves the socket, which the library listens on by now, to where plugins look for it, in the place of one that a
// runtime has left behind.
func (p *place) publish() error {
	err := os.Chmod(p.libraryPath(), 0o600)
	if err == nil {
		p.file, err = socket.Made(p.libraryPath())
	}
	if err == nil {
		err = os.Rename(p.libraryPath(), p.path)
	}
	if err == nil {
		err = os.Remove(p.private)
	}
	return p.failed(err)
}

// remove takes away what prepare and publish have made, and nothing that somebody else has put in its place.
func (p *place) remove() error {
	if !p.ours {
		return nil
	}
	return p.failed(errors.Join(os.RemoveAll(p.private), p.file.Remove(p.path)))
}

func (p *place) failed(err error) error {
	if err != nil {
		return fmt.Errorf("nri: socket %s: %w", p.path, err)
	}
	return nil
}
