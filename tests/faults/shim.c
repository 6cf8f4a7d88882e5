/* Stands between a process and the system, for one folder: counts the calls that change it, and at one of them fails.

   Loaded by LD_PRELOAD; `shim_arm` says which folder, which call (from 1, 0: none) and how it fails. What happens
   elsewhere is passed on. Built by gcc when the tests run. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { COUNT, BEFORE, TORN, AFTER, FULL, BROKEN, SHORT, FULL_FOR_GOOD };

static char folder[4096];
static size_t length;
static long wanted, count;
static int mode;

void shim_arm(const char *where, long call, int how) {
    length = strlen(where);
    memcpy(folder, where, length + 1);
    wanted = call;
    mode = how;
    count = 0;
}

long shim_count(void) { return count; }

static int inside(const char *path) { return length && !strncmp(path, folder, length); }

static int open_inside(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, path, sizeof path - 1);
    if (got < 0) return 0;
    path[got] = 0;
    return inside(path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether this call is the one; dies or gives an errno if it is to fail before it has done anything. */
static int met(int *error) {
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    *error = 0;
    if (mode == FULL_FOR_GOOD && wanted && now >= wanted) *error = ENOSPC;
    if (now != wanted) return 0;
    if (mode == BEFORE) die();
    if (mode == FULL) *error = ENOSPC;
    if (mode == BROKEN) *error = EIO;
    return 1;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define AROUND(here, failed, takes_room, call) \
    int error = 0, this = (here) && met(&error); \
    if (error == ENOSPC && !(takes_room)) error = 0; \
    if (error) { errno = error; return failed; } \
    __typeof__(call) done = call; \
    if (this && (mode == AFTER || mode == TORN)) die(); \
    return done

#define WRITES(name, ...) \
    int error = 0, this = open_inside(fd) && met(&error); \
    if (error) { errno = error; return -1; } \
    if (this && (mode == TORN || mode == SHORT)) size = size / 2; \
    ssize_t done = size || !this ? real(fd, data, size, ##__VA_ARGS__) : 0; \
    if (this && (mode == AFTER || mode == TORN)) die(); \
    return done

ssize_t write(int fd, const void *data, size_t size) { REAL(write); WRITES(write); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); WRITES(pwrite, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); WRITES(pwrite64, at); }

int fsync(int fd) { REAL(fsync); AROUND(open_inside(fd), -1, 1, real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); AROUND(open_inside(fd), -1, 1, real(fd)); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); AROUND(open_inside(fd), -1, 1, real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); AROUND(open_inside(fd), -1, 1, real(fd, size)); }
int rename(const char *old, const char *new) { REAL(rename); AROUND(inside(new), -1, 1, real(old, new)); }
int unlink(const char *path) { REAL(unlink); AROUND(inside(path), -1, 0, real(path)); }
int rmdir(const char *path) { REAL(rmdir); AROUND(inside(path), -1, 0, real(path)); }
int mkdir(const char *path, mode_t way) { REAL(mkdir); AROUND(inside(path), -1, 1, real(path, way)); }

#define RESERVES(name, type) \
    int name(int fd, type at, type size) { \
        REAL(name); \
        int error = 0, this = open_inside(fd) && met(&error); \
        if (error) return error; /* not by errno */ \
        int done = real(fd, at, size); \
        if (this && (mode == AFTER || mode == TORN)) die(); \
        return done; \
    }
RESERVES(posix_fallocate, off_t)
RESERVES(posix_fallocate64, off64_t)

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t way = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        AROUND((flags & O_CREAT) && inside(path), -1, 1, real(path, flags, way)); \
    }
OPENS(open)
OPENS(open64)
