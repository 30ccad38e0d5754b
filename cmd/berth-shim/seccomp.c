// libcontainer has libseccomp compile the profile of a container in each process that is to run in it, by hundreds of
// calls, and compiling takes longer than all else that such a process does. As the same calls always make the same
// program, they are made once and kept with it: this stands between the two (the linker's --wrap, see seccomp.go).
//
// A record is what libcontainer calls, one struct call after the other, and behind the last, CALL_EXPORT, the program. A
// process that follows a record compares each call with the next one in it, which is then answered without being made.
// The first that differs, in any argument, has all of them made after all. So there is nothing in a record to believe but
// that libseccomp made that program from these calls.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "seccomp_record.h"

#define MAX_ARGS 6
#define MAX_RECORD (1 << 20) // bytes; the default profile's is 30 KiB

// Containers that an earlier release has made have records, too: with another layout, CALL_INIT is another number.
enum { CALL_INIT = 1, CALL_ARCH, CALL_ATTR, CALL_RULE, CALL_EXPORT };

struct call {
	uint32_t kind;
	uint32_t what;  // an action, architecture or attribute
	uint32_t value; // of the attribute, or the system call
	int32_t result;
	uint32_t argc, unused;
	struct scmp_arg_cmp args[MAX_ARGS]; // argc of them are there
};

_Static_assert(sizeof(struct scmp_arg_cmp) == 24 && offsetof(struct call, args) == 24, "no padding, all of it is compared");

scmp_filter_ctx __real_seccomp_init(uint32_t action);
int __real_seccomp_arch_add(scmp_filter_ctx filter, uint32_t arch);
int __real_seccomp_attr_set(scmp_filter_ctx filter, enum scmp_filter_attr attr, uint32_t value);
int __real_seccomp_rule_add_array(scmp_filter_ctx filter, uint32_t action, int nr, unsigned int argc, const struct scmp_arg_cmp *args);
int __real_seccomp_export_bpf(const scmp_filter_ctx filter, int fd);

static int recorder = -1; // where a record is written

static const char *record, *next, *end; // the record that is followed
static scmp_filter_ctx followed;        // the filter that is made from it

static size_t size_of(const struct call *c) { return offsetof(struct call, args) + c->argc * sizeof c->args[0]; }

static int write_all(int fd, const char *data, size_t size) {
	while (size > 0) {
		ssize_t n = write(fd, data, size);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		data += n;
		size -= (size_t)n;
	}
	return 0;
}

void berth_seccomp_record(int fd) { recorder = fd; }

// The file is read at once: it is out of reach for a process that has entered its container.
void berth_seccomp_follow(const char *name) {
	int fd = open(name, O_RDONLY | O_CLOEXEC);
	struct stat st;
	char *data = NULL;
	if (fd < 0)
		return;
	if (fstat(fd, &st) == 0 && st.st_size > 0 && st.st_size <= MAX_RECORD && (data = malloc((size_t)st.st_size)) != NULL &&
	    read(fd, data, (size_t)st.st_size) == st.st_size) {
		record = next = data;
		end = data + st.st_size;
	} else {
		free(data);
	}
	close(fd);
}

// as_recorded takes c for the next call of the record, and its result from there, if it is the same.
static bool as_recorded(struct call *c) {
	size_t size = size_of(c);
	if ((size_t)(end - next) < size)
		return false;
	c->result = ((const struct call *)next)->result;
	if (memcmp(next, c, size) != 0)
		return false;
	next += size;
	return true;
}

// make_all makes the calls that have only been compared so far.
static int make_all(void) {
	scmp_filter_ctx filter = followed;
	followed = NULL;
	for (const char *at = record; at < next; at += size_of((const struct call *)at)) {
		const struct call *c = (const struct call *)at;
		int result = 0;
		switch (c->kind) {
		case CALL_INIT:
			result = seccomp_reset(filter, c->what);
			break;
		case CALL_ARCH:
			result = __real_seccomp_arch_add(filter, c->what);
			break;
		case CALL_ATTR:
			result = __real_seccomp_attr_set(filter, c->what, c->value);
			break;
		case CALL_RULE:
			result = __real_seccomp_rule_add_array(filter, c->what, (int)c->value, c->argc, c->args);
			break;
		}
		if (result != c->result) // nobody was told: without a rule, the filter may let through what it should not
			return result != 0 ? result : -EINVAL;
	}
	return 0;
}

// answered reports whether c has its result without being made.
static bool answered(scmp_filter_ctx filter, struct call *c) {
	if (filter == NULL || filter != followed)
		return false;
	if (as_recorded(c))
		return true;
	c->result = make_all();
	return c->result != 0;
}

static int made(struct call *c, int result) {
	c->result = result;
	if (recorder >= 0 && write_all(recorder, (const char *)c, size_of(c)) != 0)
		_exit(1);
	return result;
}

scmp_filter_ctx __wrap_seccomp_init(uint32_t action) {
	struct call c = {.kind = CALL_INIT, .what = action};
	followed = NULL;
	// Until it is exported the filter has no rules. Should anybody use it in a way that is not known here, it kills.
	if (record != NULL && next == record && as_recorded(&c))
		return followed = __real_seccomp_init(SCMP_ACT_KILL_PROCESS);
	scmp_filter_ctx filter = __real_seccomp_init(action);
	if (filter != NULL)
		made(&c, 0);
	return filter;
}

int __wrap_seccomp_arch_add(scmp_filter_ctx filter, uint32_t arch) {
	struct call c = {.kind = CALL_ARCH, .what = arch};
	return answered(filter, &c) ? c.result : made(&c, __real_seccomp_arch_add(filter, arch));
}

// Attributes are set in any case: libcontainer asks for them when it loads the filter.
int __wrap_seccomp_attr_set(scmp_filter_ctx filter, enum scmp_filter_attr attr, uint32_t value) {
	struct call c = {.kind = CALL_ATTR, .what = attr, .value = value};
	if (answered(filter, &c) && c.result != 0)
		return c.result;
	return made(&c, __real_seccomp_attr_set(filter, attr, value));
}

int __wrap_seccomp_rule_add_array(scmp_filter_ctx filter, uint32_t action, int nr, unsigned int argc, const struct scmp_arg_cmp *args) {
	if (argc > MAX_ARGS)
		return -EINVAL; // as libseccomp does
	struct call c = {.kind = CALL_RULE, .what = action, .value = (uint32_t)nr, .argc = argc};
	if (argc > 0)
		memcpy(c.args, args, argc * sizeof args[0]);
	return answered(filter, &c) ? c.result : made(&c, __real_seccomp_rule_add_array(filter, action, nr, argc, args));
}

int __wrap_seccomp_export_bpf(const scmp_filter_ctx filter, int fd) {
	struct call c = {.kind = CALL_EXPORT};
	if (answered(filter, &c))
		return c.result != 0 ? c.result : write_all(fd, next, (size_t)(end - next));
	if (recorder < 0)
		return __real_seccomp_export_bpf(filter, fd);
	made(&c, 0);
	_exit(__real_seccomp_export_bpf(filter, recorder) == 0 ? 0 : 1); // before anything is loaded
}
