package imagestest

import (
	"archive/tar"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"time"
)

// Features are what only some unpackers agree about in well-formed layers.
type Features struct {
	// Whiteouts, of what the layer itself does not have, and opaque directories.
	Whiteouts bool
	// AbsoluteLinks: symbolic links may be absolute, or lead upwards, and entries lie below them: the paths are the image's.
	AbsoluteLinks bool
	// Replaced: a later entry may be of another kind than an earlier one of its name.
	Replaced bool
	// Again: directories may have several entries.
	Again bool
	// Implicit: there are directories without an entry.
	Implicit bool
	// Holes: sparse files of the GNU kind.
	Holes bool
}

// RandomLayer returns the entries of a well-formed layer, the same for the same seed: directories with and without
// entries of their own, files, holes, links, devices, attributes, odd names, owners, modes and times, in the formats PAX and GNU.
func RandomLayer(seed uint64, f Features) []Entry {
	g := &generator{r: rand.New(rand.NewPCG(seed, 7)), f: f, dirs: []string{""}, last: map[string]Entry{}}
	for range 20 + g.r.IntN(60) {
		g.next()
	}
	return g.entries
}

type generator struct {
	r       *rand.Rand
	f       Features
	entries []Entry
	dirs    []string         // in which entries may lie, links among them
	files   []string         // for hard links
	last    map[string]Entry // by clean name
	n       int
}

// next adds one or two entries.
func (g *generator) next() {
	switch k := g.r.IntN(24); {
	case k < 4:
		name := g.name()
		g.add(Dir(g.style(name)), name)
		g.dirs = append(g.dirs, name)
	case k < 11:
		g.file(g.name())
	case k < 13:
		name := g.name()
		to := pick(g.r, "x", "./a//b", strings.Repeat("long/", 40)+"x")
		if g.f.AbsoluteLinks {
			to = pick(g.r, to, "../x", "a/../b", "/etc/passwd")
		}
		g.add(Symlink(g.style(name), to), name)
	case k == 13:
		g.linkedDir()
	case k == 14:
		if len(g.files) > 0 {
			g.hardLink(pick(g.r, g.files...))
		}
	case k == 15:
		name := g.name()
		major, minor := int64(1+g.r.IntN(4095)), int64(g.r.IntN(1<<20))
		g.add(pick(g.r, Fifo(g.style(name)), Char(g.style(name), major, minor), Block(g.style(name), 8, 1)), name)
	case k == 16 && g.f.Implicit:
		name := g.name() + "/implicit"
		g.dirs = append(g.dirs, path.Dir(name))
		g.file(name)
	case k == 17 && len(g.files) > 0:
		g.file(pick(g.r, g.files...)) // once more
	case k == 18 && g.f.Again:
		if name := pick(g.r, g.dirs...); name != "" && g.last[name].Typeflag == tar.TypeDir {
			g.add(Dir(name), name)
		}
	case k == 19 && g.f.Whiteouts:
		g.whiteout()
	case k == 20 && g.f.Replaced:
		g.replace()
	case k == 21 && g.f.Holes:
		g.n++
		name := fmt.Sprintf("sparse%d", g.n)
		g.entries = append(g.entries, GNUSparse(name, int64(100_000+g.r.IntN(1<<20)), 4096*int64(g.r.IntN(20)), "data "+name))
	default:
		g.file(g.name())
	}
}

// name is a new one.
func (g *generator) name() string {
	g.n++
	base := fmt.Sprintf(pick(g.r, "f%d", "f%d", "d%d", "%d.so.1", "ü–%d", "sp ace %d", "-%d", "back\\%d", "new\nline%d", "..%d", ".%d", "tab\t%d",
		strings.Repeat("p", 100)+"%d", strings.Repeat("x", 240)+"%d"), g.n)
	dir := pick(g.r, g.dirs...)
	if len(dir) > 1000 {
		dir = ""
	}
	return path.Join(dir, base)
}

// style writes a name as tools do.
func (g *generator) style(name string) string {
	return pick(g.r, "", "", "", "./", "/") + name
}

func (g *generator) file(name string) {
	size := pick(g.r, 0, 1, 511, 512, 513, 4096, g.r.IntN(70_000))
	g.add(File(g.style(name), strings.Repeat(fmt.Sprintf("%d ", g.n), size)[:size]), name)
	g.files = append(g.files, name)
}

// linkedDir is a symbolic link to a directory, below which the next entries may lie.
func (g *generator) linkedDir() {
	target := pick(g.r, g.dirs...)
	if target == "" || g.last[target].Typeflag != tar.TypeDir || strings.Contains(target, "/") {
		return
	}
	g.n++
	name, to := fmt.Sprintf("link%d", g.n), target
	if g.f.AbsoluteLinks {
		to = pick(g.r, "/", "../../", "") + target
	}
	g.add(Symlink(name, to), name)
	g.dirs = append(g.dirs, name)
}

// hardLink says of its target what the target's own entry says: unpackers differ in whether they believe it.
func (g *generator) hardLink(target string) {
	of, ok := g.last[target]
	if !ok || of.Typeflag != tar.TypeReg {
		return
	}
	name := g.name()
	link := HardLink(g.style(name), pick(g.r, "", "./", "/")+target)
	link.Header.Mode, link.Uid, link.Gid, link.ModTime = of.Header.Mode, of.Uid, of.Gid, of.ModTime
	link.PAXRecords, link.Format = of.PAXRecords, of.Format
	g.entries = append(g.entries, link)
}

func (g *generator) whiteout() {
	g.n++
	dir := pick(g.r, g.dirs...)
	g.entries = append(g.entries, File(path.Join(dir, fmt.Sprintf(".wh.gone%d", g.n)), ""))
	if dir != "" && g.r.IntN(2) == 0 {
		g.entries = append(g.entries, File(dir+"/.wh..wh..opq", ""))
	}
}

// replace puts something of another kind in a file's place.
func (g *generator) replace() {
	if len(g.files) == 0 {
		return
	}
	i := g.r.IntN(len(g.files))
	name := g.files[i]
	g.files = append(g.files[:i:i], g.files[i+1:]...)
	if g.r.IntN(2) == 0 {
		g.add(Symlink(name, "elsewhere"), name)
		return
	}
	g.add(Dir(name), name)
	g.file(name + "/below")
}

// add gives an entry an owner, a mode, a time and attributes.
func (g *generator) add(e Entry, name string) {
	r := g.r
	e.Uid = pick(r, 0, 0, 1, 1000, 65534, 1<<21, 1<<31, 1<<32-2)
	e.Gid = pick(r, 0, 0, 5, 1000, 1<<31+5)
	if e.Typeflag != tar.TypeSymlink {
		e.Header.Mode = pick(r, e.Header.Mode, int64(r.IntN(0o10000)))
	}
	e.ModTime = pick(r, Epoch, time.Unix(0, 0), time.Unix(r.Int64N(1<<31), 0), time.Unix(1<<32+r.Int64N(1<<31), 0))
	e.Format = pick(r, tar.FormatPAX, tar.FormatGNU)
	if e.Format == tar.FormatPAX {
		e.ModTime = e.ModTime.Add(time.Duration(r.IntN(1_000_000_000)))
		if e.Typeflag == tar.TypeReg || e.Typeflag == tar.TypeDir {
			for i := range r.IntN(3) {
				e = e.Xattr(fmt.Sprintf("user.a%d", i), pick(r, "x", "new\nline", strings.Repeat("v", 300)))
			}
		}
		if e.Typeflag == tar.TypeReg && r.IntN(4) == 0 {
			e = e.Xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
		}
	}
	g.last[name] = e
	g.entries = append(g.entries, e)
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }
