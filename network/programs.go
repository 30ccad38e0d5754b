package network

import (
	"debug/buildinfo"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
)

// The plugins that are answered in process are those of this module, as its versions of this beginning are.
const (
	referenceModule  = "github.com/containernetworking/plugins"
	referenceVersion = "v1.9."
)

// programs remembers which programs of plugins are the reference plugins.
type programs struct {
	mu    sync.Mutex
	known map[string]program
}

type program struct {
	stat      os.FileInfo
	reference bool
}

// reference says whether a program is the reference plugin of that type in a version that does what is done in process. It
// tells by what Go notes in programs: to run it would take longer, and its version is not in what the specification has it
// say.
func (p *programs) reference(log *slog.Logger, typ, file string) bool {
	st, err := os.Stat(file)
	if err != nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if was, ok := p.known[file]; ok && os.SameFile(was.stat, st) && was.stat.Size() == st.Size() && was.stat.ModTime().Equal(st.ModTime()) {
		return was.reference
	}
	made := "unknown"
	info, err := buildinfo.ReadFile(file)
	if err == nil && isReference(info, typ) {
		made = versionOf(info)
	}
	is := strings.HasPrefix(made, referenceVersion)
	if p.known == nil {
		p.known = map[string]program{}
	}
	p.known[file] = program{st, is}
	if !is {
		log.Info("cni plugin is not answered in process: its program is not the reference plugin "+referenceVersion+"x", "plugin", file, "version", made)
	}
	return is
}

func isReference(info *debug.BuildInfo, typ string) bool {
	return strings.HasPrefix(info.Path, referenceModule+"/plugins/") && strings.HasSuffix(info.Path, "/"+typ)
}

// versionOf is the version of the reference module that a program is made of: the releases' own programs have it from the
// linker's flags.
func versionOf(info *debug.BuildInfo) string {
	for _, m := range append(info.Deps, &info.Main) {
		if m.Path == referenceModule && strings.HasPrefix(m.Version, "v") {
			return m.Version
		}
	}
	for _, s := range info.Settings {
		if _, v, ok := strings.Cut(s.Value, referenceModule+"/pkg/utils/buildversion.BuildVersion="); ok && s.Key == "-ldflags" {
			v, _, _ = strings.Cut(v, " ")
			return strings.Trim(v, `"'`)
		}
	}
	return "unknown"
}
