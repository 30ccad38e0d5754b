package cdi

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

const (
	maxFile  = 1 << 20 // bytes of a specification
	maxFiles = 1000    // of a directory
)

// Registry is the directories of CDI specifications, the later ones before the earlier.
type Registry struct {
	Dirs []string
}

// Resolve looks the devices up, each once. A device that no file defines, or two files of one directory do, is an error
// that names it, and the files that could not be read.
func (r Registry) Resolve(names []string) (*Edits, error) {
	if len(names) == 0 {
		return nil, nil
	}
	known, bad := r.load()
	edits := &cdi.ContainerEdits{}
	var devices []string
	specs := map[*cdi.Spec]bool{}
	for _, name := range names {
		if slices.Contains(devices, name) {
			continue
		}
		devices = append(devices, name)
		found := known[name]
		if len(found) != 1 {
			return nil, r.unresolved(name, found, bad)
		}
		device := found[0]
		if spec := device.GetSpec(); !specs[spec] {
			specs[spec] = true
			edits.Append(&cdi.ContainerEdits{ContainerEdits: &spec.ContainerEdits})
		}
		edits.Append(&cdi.ContainerEdits{ContainerEdits: &device.ContainerEdits})
	}
	out := &Edits{devices: devices, edits: edits}
	return out, out.check()
}

func (r Registry) unresolved(name string, found []*cdi.Device, bad []error) error {
	if len(found) > 1 {
		return fmt.Errorf("CDI device %q is defined by two files of one directory: %w", name, errdefs.ErrFailedPrecondition)
	}
	if len(r.Dirs) == 0 {
		return fmt.Errorf("CDI device %q: CDI is off on this node (cdiSpecDirs is empty): %w", name, errdefs.ErrFailedPrecondition)
	}
	text := fmt.Sprintf("CDI device %q is in no file of %s", name, strings.Join(r.Dirs, ", "))
	if len(bad) > 0 {
		text += "; not read: " + brief(errors.Join(bad...).Error())
	}
	return fmt.Errorf("%s: %w", text, errdefs.ErrFailedPrecondition)
}

// brief is one line of bounded length.
func brief(s string) string {
	const most = 1000
	s = strings.ReplaceAll(s, "\n", "; ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// load reads all specifications. Of each device it has those of the last directory that defines it: one, unless files
// contradict each other.
func (r Registry) load() (known map[string][]*cdi.Device, bad []error) {
	known = map[string][]*cdi.Device{}
	for priority, dir := range r.Dirs {
		files, err := specFiles(dir)
		if err != nil {
			bad = append(bad, err)
		}
		here := map[string][]*cdi.Device{}
		for _, file := range files {
			spec, err := readSpec(file, priority)
			if err != nil {
				bad = append(bad, fmt.Errorf("%s: %w", file, err))
				continue
			}
			for _, d := range spec.Devices {
				device := spec.GetDevice(d.Name)
				here[device.GetQualifiedName()] = append(here[device.GetQualifiedName()], device)
			}
		}
		for name, list := range here {
			known[name] = list
		}
	}
	return known, bad
}

// specFiles lists the files of a directory that may be specifications. A directory that is missing has none.
func specFiles(dir string) ([]string, error) {
	// Not blocking, in case that it is a fifo.
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var files []string
	for {
		names, err := f.Readdirnames(512)
		for _, name := range names {
			if ext := filepath.Ext(name); ext != ".json" && ext != ".yaml" {
				continue
			}
			if len(files) == maxFiles {
				slices.Sort(files)
				return files, fmt.Errorf("%s: more than %d files; the rest is not read", dir, maxFiles)
			}
			files = append(files, filepath.Join(dir, name))
		}
		if errors.Is(err, io.EOF) {
			slices.Sort(files)
			return files, nil
		}
		if err != nil {
			return files, err
		}
	}
}

// readSpec reads and validates one file. What is not a regular file is not opened for reading: a fifo would hold us, and
// a device do something. Nor is one without a size, as those of procfs are: /proc/kmsg waits for the kernel to speak.
func readSpec(path string, priority int) (*cdi.Spec, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("not a regular file")
	}
	if st.Size == 0 {
		return nil, errors.New("empty")
	}
	if st.Size > maxFile {
		return nil, fmt.Errorf("%d bytes, more than %d", st.Size, maxFile)
	}
	f, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile)) // however it grows meanwhile
	if err != nil {
		return nil, err
	}
	return parse(data, priority)
}

// parse has the library read and validate a specification. It does so only for a file that it opens itself: it gets one in
// memory that holds what was read.
func parse(data []byte, priority int) (*cdi.Spec, error) {
	fd, err := unix.MemfdCreate("cdi", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3
		fd, err = unix.MemfdCreate("cdi", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "cdi")
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return nil, err
	}
	spec, err := cdi.ReadSpec("/proc/self/fd/"+strconv.Itoa(fd), priority)
	if err != nil {
		// The name of the file in memory says nothing to anybody.
		return nil, errors.New(strings.ReplaceAll(err.Error(), fmt.Sprintf(" %q", "/proc/self/fd/"+strconv.Itoa(fd)), ""))
	}
	return spec, nil
}
