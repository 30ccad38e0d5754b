package testimages

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// pauseSource is a PID 1 that reaps and waits; nnpSource tells which user it runs as, to show what setuid still does.
const (
	pauseSource = `#include <signal.h>
#include <unistd.h>
#include <sys/wait.h>
static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0); }
static void leave(int s) { (void)s; _exit(0); }
int main(void) { signal(SIGINT, leave); signal(SIGTERM, leave); signal(SIGCHLD, reap); for (;;) pause(); }
`
	nnpSource = `#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\n", geteuid()); return 0; }
`
)

// compile makes a small static program of C source.
func (b *Builder) compile(ctx context.Context, source string) ([]byte, error) {
	out := filepath.Join(b.Work, "a.out")
	cmd := exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-Wl,--build-id=none", "-x", "c", "-o", out, "-")
	cmd.Stdin = strings.NewReader(source)
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w: %s", err, text)
	}
	return os.ReadFile(out)
}

// nginxPackages are unpacked, not installed: no service starts on the machine, and nothing has to be removed again.
var nginxPackages = []string{"nginx", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g"}

// nginx is the layer of Debian's nginx with the libraries that it loads.
func (b *Builder) nginx(ctx context.Context) ([]byte, error) {
	dir := filepath.Join(b.Work, "nginx")
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	run := func(name string, args ...string) error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		if text, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
		}
		return nil
	}
	download := append([]string{"-q", "-o", "APT::Sandbox::User=root", "download"}, nginxPackages...)
	if err := run("apt-get", download...); err != nil {
		// Package lists are absent on a fresh machine, and old ones name versions that the mirror has dropped.
		if err := run("apt-get", "update", "-qq"); err != nil {
			return nil, err
		}
		if err := run("apt-get", download...); err != nil {
			return nil, err
		}
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	for _, deb := range debs {
		if err := run("dpkg-deb", "-x", deb, root); err != nil {
			return nil, err
		}
	}
	entries, err := withLibraries(root, "usr/sbin/nginx")
	if err != nil {
		return nil, err
	}
	return Layer(entries...)
}

// withLibraries lists a program below root with its loader and every shared library that it or they need.
func withLibraries(root, program string) ([]Entry, error) {
	var entries []Entry
	seen := map[string]bool{}
	queue := []string{program}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if seen[name] {
			continue
		}
		seen[name] = true
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		entries = append(entries, Program(name, data))
		needed, err := needs(filepath.Join(root, name))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for _, lib := range needed {
			found, err := locate(root, lib)
			if err != nil {
				return nil, fmt.Errorf("%s needs %s: %w", name, lib, err)
			}
			queue = append(queue, found)
		}
	}
	return entries, nil
}

// needs lists what an ELF file loads: its libraries by name and its loader by path.
func needs(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	libs, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		loader := make([]byte, p.Filesz)
		if _, err := p.ReadAt(loader, 0); err != nil {
			return nil, err
		}
		libs = append(libs, strings.TrimRight(string(loader), "\x00"))
	}
	return libs, nil
}

// locate finds a library below root, where Debian's packages put them.
func locate(root, lib string) (string, error) {
	if filepath.IsAbs(lib) { // the loader: the packages may have it as /lib64/... or below /lib/TRIPLET
		if _, err := os.Stat(filepath.Join(root, lib)); err == nil {
			return strings.TrimPrefix(lib, "/"), nil
		}
		lib = filepath.Base(lib)
	}
	for _, pattern := range []string{"lib/*-linux-gnu", "usr/lib/*-linux-gnu"} {
		hits, err := filepath.Glob(filepath.Join(root, pattern, lib))
		if err != nil {
			return "", err
		}
		if len(hits) > 0 {
			return filepath.Rel(root, hits[0])
		}
	}
	return "", errors.Join(fs.ErrNotExist, fmt.Errorf("in none of the packages %v", nginxPackages))
}
