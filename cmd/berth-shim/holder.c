// A holder makes the namespaces of a pod with a user namespace of its own, keeps them until the daemon has pinned them, and
// writes the pod's sysctls as root of that user namespace: see network/userns.go for what it is told and tells. It does so
// before Go starts, which takes longer than all of this.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PROC 3 // descriptor of a procfs

static int berth_set(char *setting) {
	char *value = strchr(setting, '=');
	if (value == NULL)
		return EINVAL;
	*value++ = '\0';
	int fd = openat(PROC, setting, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return errno;
	size_t length = strlen(value);
	ssize_t n = write(fd, value, length);
	int failed = n < 0 ? errno : (size_t)n != length ? EINVAL : 0;
	close(fd);
	return failed;
}

__attribute__((constructor)) static void berth_hold_if_asked(int argc, char **argv) {
	if (getenv("_BERTH_HOLDER") == NULL)
		return;
	prctl(PR_SET_NAME, "berth-holder", 0, 0, 0);
	uint32_t answer[2] = {0, 0};
	if (argc < 2)
		_exit(1);
	if (unshare(atoi(argv[1])) < 0) {
		answer[0] = UINT32_MAX;
		answer[1] = (uint32_t)errno;
		argc = 0;
	}
	for (int i = 2; i < argc; i++) {
		int failed = berth_set(argv[i]);
		if (failed != 0) {
			answer[0] = (uint32_t)(i - 2);
			answer[1] = (uint32_t)failed;
			break;
		}
	}
	if (write(1, answer, sizeof answer) != sizeof answer)
		_exit(1);
	char end;
	while (read(0, &end, 1) > 0 || errno == EINTR)
		errno = 0;
	_exit(0);
}
