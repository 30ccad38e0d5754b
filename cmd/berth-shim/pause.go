package main

/*
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NOBODY 65534
#define READY 3  // where the shim waits for one byte
#define USERNS 4 // the pod's user namespace, if it has one of its own

static void need(int ok, const char *what) {
	if (ok)
		return;
	fprintf(stderr, "berth-shim: pause: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void ignore(int signal) {
	struct sigaction act = {.sa_handler = SIG_IGN};
	need(sigaction(signal, &act, NULL) == 0, "sigaction");
}

// berth_enter goes on as PID 1 of a PID namespace that belongs to the pod's user namespace, as a child of the shim; the
// shim is told its pid. Whoever is root there may mount the /proc of such a PID namespace, as containers have to.
static void berth_enter(void) {
	int parent_ended[2];
	need(setns(USERNS, CLONE_NEWUSER) == 0, "enter user namespace");
	need(setgroups(0, NULL) == 0, "setgroups");
	need(setresgid(0, 0, 0) == 0, "setresgid");
	need(setresuid(0, 0, 0) == 0, "setresuid");
	need(unshare(CLONE_NEWPID) == 0, "unshare");
	need(pipe(parent_ended) == 0, "pipe");
	struct clone_args args = {.flags = CLONE_PARENT};
	pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
	need(pid >= 0, "clone");
	if (pid > 0) {
		need(write(READY, &pid, sizeof pid) == sizeof pid, "tell the shim");
		_exit(0);
	}
	char end;
	close(parent_ended[1]);
	need(read(parent_ended[0], &end, 1) == 0, "wait for the parent's end");
}

// berth_pause turns this process into one that has nothing and does nothing, and never returns. It runs before Go does:
// capabilities and no_new_privs belong to threads, and Go has several at once.
static void berth_pause(void) {
	unsigned int nobody = NOBODY;
	const char *given = getenv("_BERTH_PAUSE_NOBODY");
	if (given != NULL) {
		nobody = (unsigned int)strtoul(given, NULL, 10);
		berth_enter();
	}
	ignore(SIGCHLD); // the kernel reaps its children then
	ignore(SIGTERM);
	ignore(SIGINT);
	ignore(SIGHUP);
	ignore(SIGQUIT);
	need(prctl(PR_SET_NAME, "pause", 0, 0, 0) == 0, "name");

	// Its SELinux label waits for the end: what follows is not for containers to do.
	const char *label = getenv("_BERTH_PAUSE_LABEL"), *context = getenv("_BERTH_PAUSE_CONTEXT");
	int current = label == NULL ? -1 : open("/proc/self/attr/current", O_WRONLY | O_CLOEXEC);
	char options[8192];
	const char *format = context == NULL ? "%s" : "%s,context=\"%s\"";
	int length = snprintf(options, sizeof options, format, "size=4k,nr_inodes=1,mode=555", context);
	errno = E2BIG;
	need(length >= 0 && (size_t)length < sizeof options, "context");

	// A root of its own, empty and read-only, in the place of the host's. /proc is a directory that every host has.
	need(unshare(CLONE_NEWNS) == 0, "unshare");
	need(mount("", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "make mounts private");
	need(mount("pause", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) == 0, "mount");
	need(chdir("/proc") == 0, "chdir");
	need(syscall(SYS_pivot_root, ".", ".") == 0, "pivot_root");
	need(umount2(".", MNT_DETACH) == 0, "leave the host's root");
	need(chdir("/") == 0, "chdir");
	need(mount("", "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0, "make its root read-only");

	// No capability, and no way to one.
	for (int c = 0; prctl(PR_CAPBSET_READ, c, 0, 0, 0) >= 0; c++)
		need(prctl(PR_CAPBSET_DROP, c, 0, 0, 0) == 0, "drop capabilities");
	need(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
	need(setgroups(0, NULL) == 0, "setgroups");
	need(setresgid(nobody, nobody, nobody) == 0, "setresgid");
	need(setresuid(nobody, nobody, nobody) == 0, "setresuid");
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2];
	memset(none, 0, sizeof none);
	need(syscall(SYS_capset, &head, none) == 0, "capset");
	need(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0, "not dumpable");

	// A policy may not let the daemon's domain change to a container's: then it stays what it is, which has nothing either.
	if (current >= 0 && write(current, label, strlen(label)) < 0)
		fprintf(stderr, "berth-shim: pause: SELinux label %s: %s\n", label, strerror(errno));
	need(write(READY, "1", 1) == 1, "tell the shim");
	for (int fd = (int)sysconf(_SC_OPEN_MAX); syscall(SYS_close_range, 0, ~0U, 0) != 0 && fd >= 0; fd--)
		close(fd);
	for (;;)
		pause();
}

// Signals 32 and 33 are the C library's own, which hides them from everybody, and Go does not touch them: ignored by
// whatever started the daemon, they would be ignored in every container. The other signals Go sets, see defaultSignals.
__attribute__((constructor)) static void berth_hidden_signals(void) {
	char by_default[32] = {0}; // larger than the kernel's struct sigaction without its mask; SIG_DFL is 0
	for (int signal = 32; signal < 34; signal++)
		syscall(SYS_rt_sigaction, signal, by_default, NULL, 8);
}

__attribute__((constructor)) static void berth_pause_if_asked(void) {
	if (getenv("_BERTH_PAUSE") != NULL)
		berth_pause();
}
*/
import "C"

import "errors"

// errPause is what is left of mode "pause" for Go to say: PID 1 of a pod's shared PID namespace is made above, by whoever
// sets _BERTH_PAUSE.
//
// Containers of the pod see that process. One that may trace others (SYS_PTRACE, as debuggers have it) can look through
// its eyes, /proc/1/root, and have it do what it likes: so it must have nothing that they have not, least of all the
// host's files. The kernel gives it no signal from inside that it does not handle.
var errPause = errors.New("is for a shim to start, with _BERTH_PAUSE set")
