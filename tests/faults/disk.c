/* Stands between a process and its disk: strikes at the n-th system call that changes one folder.
 *
 * Loaded with LD_PRELOAD, so that Python's calls and those of native libraries pass through it. A
 * strike is SIGKILL, or an error that lasts until the trap is disarmed; a write is half done first.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[PATH_MAX];
static long calls, target;
static int error;

void disk_arm(const char *folder, long at, int code) {
    snprintf(root, sizeof root, "%s", folder);
    calls = 0;
    target = at;
    error = code;
}

long disk_calls(void) { return calls; }

static int inside(const char *path) {
    return root[0] && path && strncmp(path, root, strlen(root)) == 0;
}

static int inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}

static int inside_at(int fd, const char *path) {
    return path && path[0] == '/' ? inside(path) : inside_fd(fd);
}

/* Whether this call fails; does not return where it kills. */
static int struck(void) {
    calls++;
    if (!target || calls < target) return 0;
    if (!error) raise(SIGKILL);
    errno = error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int changes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                   \
        if (changes(flags) && inside(path) && struck()) return -1;      \
        return REAL(name)(path, flags, mode);                           \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
    int name(int fd, const char *path, int flags, ...) {                \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                   \
        if (changes(flags) && inside_at(fd, path) && struck()) return -1; \
        return REAL(name)(fd, path, flags, mode);                       \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    if (inside_fd(fd)) {
        if (target && calls + 1 == target) REAL(write)(fd, data, size / 2);
        if (struck()) return -1;
    }
    return REAL(write)(fd, data, size);
}

#define ON_FD(name, parameters, arguments)                              \
    int name parameters {                                               \
        if (inside_fd(fd) && struck()) return -1;                       \
        return REAL(name) arguments;                                    \
    }
ON_FD(fsync, (int fd), (fd))
ON_FD(fdatasync, (int fd), (fd))
ON_FD(ftruncate, (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, (int fd, off64_t size), (fd, size))

#define ON_PATH(name, parameters, arguments)                            \
    int name parameters {                                               \
        if (inside(path) && struck()) return -1;                        \
        return REAL(name) arguments;                                    \
    }
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_PATH(unlink, (const char *path), (path))
ON_PATH(rmdir, (const char *path), (path))
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))

int renameat(int fd, const char *path, int to_fd, const char *to) {
    if (inside_at(fd, path) && struck()) return -1;
    return REAL(renameat)(fd, path, to_fd, to);
}

int unlinkat(int fd, const char *path, int flags) {
    if (inside_at(fd, path) && struck()) return -1;
    return REAL(unlinkat)(fd, path, flags);
}
