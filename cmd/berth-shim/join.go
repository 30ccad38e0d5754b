package main

/*
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "seccomp_record.h"

// joined moves this process into a cgroup of v1 by its file "tasks".
//
// Somebody else who moves a process has to hold still all forks of the machine, for which the kernel waits for 7 to 15 ms
// each time. A thread that moves itself, by a 0 in "tasks", has not; and here the process has no other thread yet.
static int joined(const char *tasks) {
	int fd = open(tasks, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	int done = write(fd, "0", 1) == 1, error = errno;
	close(fd);
	errno = error;
	return done;
}

// berth_join_sandbox moves a shim into its cgroups before Go runs. The files come in the environment, one in a line, which is
// empty for whatever the shim starts: they are there by then.
__attribute__((constructor(200))) static void berth_join_sandbox(void) {
	char *at = getenv("_BERTH_JOIN");
	if (at == NULL)
		return;
	char *all = at;
	size_t size = strlen(all);
	for (char *end; *at != '\0'; at = end) {
		end = at + strcspn(at, "\n");
		int last = *end == '\0';
		*end = '\0';
		if (!joined(at)) {
			fprintf(stderr, "cgroup of the sandbox: %s: %s\n", at, strerror(errno));
			_exit(1); // it would run without limits
		}
		if (last) {
			memset(all, 0, size);
			return;
		}
		end++;
	}
}

// berth_join moves an exec'd process into its container's cgroups, on v1, before libcontainer's constructor and Go run. The
// files come behind the log level, which libcontainer hands on: one in a line. Another line may be the seccomp record.
__attribute__((constructor(200))) static void berth_join(void) {
	char *at = getenv("_LIBCONTAINER_LOGLEVEL");
	if (at == NULL || (at = strchr(at, '\n')) == NULL)
		return;
	*at++ = '\0'; // what libcontainer reads, in C and in Go
	for (char *end; *at != '\0'; at = end) {
		end = at + strcspn(at, "\n");
		if (*end != '\0')
			*end++ = '\0';
		if (strncmp(at, "seccomp:", 8) == 0) {
			berth_seccomp_follow(at + 8);
			continue;
		}
		if (!joined(at)) {
			const char *log = getenv("_LIBCONTAINER_LOGPIPE");
			if (log != NULL)
				dprintf(atoi(log), "{\"level\":\"error\",\"msg\":\"cgroup of an exec: %s: %s\"}\n", at, strerror(errno));
			_exit(1); // it would run without limits
		}
	}
}
*/
import "C"

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"

	"github.com/berth-run/berth/cri/shim"
)

// logLevel is libcontainer's for its inits, "warning": each line costs them a write.
const logLevel = "3"

// execRoot is a second state directory of a container: of that state libcontainer knows no cgroups, so that it moves no
// exec'd process, which does that itself.
func execRoot(stateRoot, id string) string { return filepath.Join(stateRoot, id, "exec") }

// joinFile lists the cgroups that an exec'd process joins: a JSON object of directories by controller.
const joinFile = "cgroups.json"

// writeExecState makes the directory for execs in a container that has just been made. On v2 there is none: libcontainer
// has the kernel start the process in its cgroup. On an error there is none either, and execs go the long way.
func writeExecState(stateRoot, id string) (err error) {
	if cgroups.IsCgroup2UnifiedMode() {
		return nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(execRoot(stateRoot, id)))
		}
	}()
	data, err := os.ReadFile(filepath.Join(stateRoot, id, "state.json"))
	if err != nil {
		return err
	}
	// Only what is changed is decoded, so that what else there is stays to the letter.
	var state, config, cgroup map[string]json.RawMessage
	var paths map[string]string
	if err := json.Unmarshal(data, &state); err != nil {
		return err
	}
	for _, part := range []struct {
		data json.RawMessage
		to   any
	}{{state["cgroup_paths"], &paths}, {state["config"], &config}} {
		if err := json.Unmarshal(part.data, part.to); err != nil {
			return err
		}
	}
	if err := json.Unmarshal(config["cgroups"], &cgroup); err != nil {
		return err
	}
	delete(cgroup, "Systemd")
	for _, part := range []struct {
		into  map[string]json.RawMessage
		key   string
		value any
	}{{config, "cgroups", cgroup}, {state, "config", config}, {state, "cgroup_paths", struct{}{}}} {
		if part.into[part.key], err = json.Marshal(part.value); err != nil {
			return err
		}
	}
	// A hybrid machine's hierarchy without controllers limits nothing, and a process cannot move itself there at once.
	delete(paths, "")
	dir := filepath.Join(execRoot(stateRoot, id), id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, f := range []struct {
		name  string
		value any
	}{{"state.json", state}, {joinFile, paths}} { // whoever finds the second finds the first
		data, err := json.Marshal(f.value)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, f.name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// loadForExec loads a container to run a process in it, and says which files the process has to join; none where
// libcontainer moves it.
func loadForExec(req shim.ExecRequest) (*libcontainer.Container, []string, error) {
	root := execRoot(req.StateRoot, req.ID)
	data, err := os.ReadFile(filepath.Join(root, req.ID, joinFile))
	if os.IsNotExist(err) || err == nil && req.CgroupDir == "" { // v2, or made by a release before this one
		c, err := libcontainer.Load(req.StateRoot, req.ID)
		return c, nil, err
	}
	if err != nil {
		return nil, nil, err
	}
	var paths map[string]string
	if err := json.Unmarshal(data, &paths); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", joinFile, err)
	}
	if _, ok := paths[req.CgroupController]; !ok {
		return nil, nil, fmt.Errorf("%s has no %s controller", joinFile, req.CgroupController)
	}
	paths[req.CgroupController] = execDir(req)
	dirs := slices.Compact(slices.Sorted(maps.Values(paths))) // some controllers share a hierarchy
	for i, dir := range dirs {
		if strings.ContainsRune(dir, '\n') {
			return nil, nil, fmt.Errorf("cgroup %q has a line break in its name", dir)
		}
		dirs[i] = filepath.Join(dir, "tasks")
	}
	c, err := libcontainer.Load(root, req.ID)
	return c, dirs, err
}
