/* Preloaded: makes the n-th call that changes a disk fail, or sends a signal there. Armed from Python by ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

static long calls, at; /* calls so far; the one to disturb, 0 = none */
static int exchange = 1; /* whether the file system can exchange two names */
static int number;     /* > 0: errno to fail with, < 0: signal to send */

void faults_arm(long n, int what) { calls = 0; at = n; number = what; }
long faults_calls(void) { return calls; }
void faults_exchange(int can) { exchange = can; }

/* A disk that is full stays so, and only calls that want more room fail. */
static int disturbed(int grows) {
    calls++;
    int full = number == ENOSPC;
    if (!at || calls < at || (calls > at && !full) || (full && !grows)) return 0;
    if (number < 0) {
        kill(getpid(), -number);
        return 0;
    }
    errno = number;
    return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) { REAL(write); return disturbed(1) ? -1 : real(fd, data, size); }
int fsync(int fd) { REAL(fsync); return disturbed(1) ? -1 : real(fd); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return disturbed(1) ? -1 : real(path, mode); }
int rename(const char *a, const char *b) { REAL(rename); return disturbed(0) ? -1 : real(a, b); }
int renameat(int d, const char *a, int e, const char *b) { REAL(renameat); return disturbed(0) ? -1 : real(d, a, e, b); }
int renameat2(int d, const char *a, int e, const char *b, unsigned flags) {
    REAL(renameat2);
    if (flags && !exchange) return errno = EINVAL, -1;
    return disturbed(0) ? -1 : real(d, a, e, b, flags);
}
int unlink(const char *path) { REAL(unlink); return disturbed(0) ? -1 : real(path); }
int unlinkat(int d, const char *path, int flags) { REAL(unlinkat); return disturbed(0) ? -1 : real(d, path, flags); }
int rmdir(const char *path) { REAL(rmdir); return disturbed(0) ? -1 : real(path); }
