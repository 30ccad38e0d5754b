package testimages

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// Entry is one file, directory or link of a layer.
type Entry struct {
	Name string      // without a leading slash
	Type byte        // tar.TypeReg (also when zero), tar.TypeDir, tar.TypeLink, tar.TypeSymlink
	Mode fs.FileMode // permission bits with fs.ModeSetuid and the like
	Data []byte      // of a regular file
	Link string      // target of a link
	UID  int
	GID  int
}

// Dir is a directory that anyone may enter.
func Dir(name string) Entry { return Entry{Name: name, Type: tar.TypeDir, Mode: 0o755} }

// File is a regular file that anyone may read.
func File(name, content string) Entry {
	return Entry{Name: name, Mode: 0o644, Data: []byte(content)}
}

// Program is a regular file that anyone may execute.
func Program(name string, content []byte) Entry {
	return Entry{Name: name, Mode: 0o755, Data: content}
}

// made is the time of every file: the same inputs must give the same digests.
var made = time.Unix(1700000000, 0)

// Layer is the tar archive of the entries. Parent directories that no entry names are put before them.
func Layer(entries ...Entry) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	seen := map[string]bool{".": true}
	write := func(e Entry) error {
		h := &tar.Header{
			Name: e.Name, Typeflag: e.Type, Mode: tarMode(e.Mode), Size: int64(len(e.Data)), Linkname: e.Link,
			Uid: e.UID, Gid: e.GID, ModTime: made, Format: tar.FormatPAX,
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
			seen[e.Name] = true
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(e.Data)
		return err
	}
	for _, e := range entries {
		for _, dir := range parents(e.Name) {
			if seen[dir] {
				continue
			}
			if err := write(Dir(dir)); err != nil {
				return nil, fmt.Errorf("layer: directory %s: %w", dir, err)
			}
		}
		if err := write(e); err != nil {
			return nil, fmt.Errorf("layer: %s: %w", e.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	return buf.Bytes(), nil
}

// tarMode turns Go's mode bits into those of Unix.
func tarMode(m fs.FileMode) int64 {
	mode := int64(m.Perm())
	for bit, unix := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= unix
		}
	}
	return mode
}

// parents lists the directories above name, outermost first.
func parents(name string) []string {
	var dirs []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		dirs = append([]string{dir}, dirs...)
	}
	return dirs
}

// tree is the layer of a directory of this machine as it stands, under its own path. Of files that are neither regular,
// nor directories, nor symbolic links it takes none.
func tree(dir string) ([]byte, error) {
	var entries []Entry
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := Entry{Name: strings.TrimPrefix(p, "/"), Mode: info.Mode()}
		switch {
		case info.IsDir():
			e.Type = tar.TypeDir
		case info.Mode().IsRegular():
			e.Data, err = os.ReadFile(p)
		case info.Mode()&fs.ModeSymlink != 0:
			e.Type = tar.TypeSymlink
			e.Link, err = os.Readlink(p)
		default:
			return nil
		}
		entries = append(entries, e)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("layer of %s: %w", dir, err)
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name < entries[j].Name })
	return Layer(entries...)
}
