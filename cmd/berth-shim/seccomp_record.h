// See seccomp.c.
void berth_seccomp_record(int fd);
void berth_seccomp_follow(const char *name);
