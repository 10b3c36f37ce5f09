/* Loaded ahead of the C library (LD_PRELOAD) into a process under test. It sees the calls that change files below one
 * folder, whichever library makes them, and at a chosen one of them ends the process, sends it a signal, or fills the
 * disk for good. Nothing happens before `torture_arm`. */
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
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL, SIGNAL };

static char root[4096], wanted[4200];
static size_t root_length;
static long chosen, seen;
static int what, number, journal = -1, filled;

/* At the `at`-th of the calls `where` ("rename words/prompts.json", relative to `folder`; any call if empty): KILL before
 * it, TEAR (half of a write, then SIGKILL), FULL (half of a write, then no room, from there on), or SIGNAL before it.
 * `log`, if it is no -1, gets a line for each call. */
void torture_arm(const char *folder, const char *where, long at, int action, int signal_number, int log) {
    snprintf(root, sizeof root, "%s", folder);
    snprintf(wanted, sizeof wanted, "%s", where);
    root_length = strlen(root);
    chosen = at, seen = 0, filled = 0, what = action, number = signal_number, journal = log;
}

/* "call path", the path relative to the folder and without the random part of a temporary name: .NAME.12345678.tmp */
static void describe(char *into, size_t room, const char *call, const char *path) {
    path += root_length;
    int length = snprintf(into, room, "%s %s", call, *path ? path + 1 : ".");
    for (int at = 0; at + 13 <= length; at++)
        if (into[at] == '.' && !strncmp(into + at + 9, ".tmp", 4) && !memchr(into + at + 1, '.', 8))
            memset(into + at + 1, '*', 8);
}

/* The whole path if it is the folder or below it, else NULL. `room` holds a path that is relative to another folder. */
static const char *within(int folder, const char *path, char room[8192]) {
    if (!root_length || !path) return NULL;
    if (path[0] != '/' && folder != AT_FDCWD) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, room, 4096);
        if (length < 0) return NULL;
        snprintf(room + length, 8192 - length, "/%s", path);
        path = room;
    }
    if (strncmp(path, root, root_length)) return NULL;
    return path[root_length] == '/' || !path[root_length] ? path : NULL;
}

/* Whether the disk is full for this call. `fd` and `data` are those of a write, which may be torn in the middle. */
static int meet(const char *call, const char *path, int fd, const void *data, size_t size, int needs_room) {
    char here[4200];
    describe(here, sizeof here, call, path);
    if (journal >= 0) dprintf(journal, "%s\n", here);
    if (filled) return needs_room;
    if (what == COUNT || (*wanted && strcmp(wanted, here))) return 0;
    if (__atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != chosen) return 0;
    if ((what == TEAR || what == FULL) && data && size > 1) {
        ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
        if (real(fd, data, size / 2) < 0) perror("torture");
    }
    if (what == KILL || what == TEAR) kill(getpid(), SIGKILL), pause();
    if (what == SIGNAL) raise(number);
    filled = what == FULL;
    return filled && needs_room;
}

static int full_for(int folder, const char *call, const char *path, int needs_room) {
    char room[8192];
    path = within(folder, path, room);
    return path && meet(call, path, -1, NULL, 0, needs_room);
}

static int full_for_fd(int fd, const char *call, const void *data, size_t size, int needs_room) {
    char link[64], path[4096];
    if (!root_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return within(AT_FDCWD, path, NULL) && meet(call, path, fd, data, size, needs_room);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define NO_ROOM return errno = ENOSPC, -1

ssize_t write(int fd, const void *data, size_t size) {
    if (full_for_fd(fd, "write", data, size, 1)) NO_ROOM;
    return REAL(write)(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    if (full_for_fd(fd, "pwrite", NULL, 0, 1)) NO_ROOM;
    return REAL(pwrite64)(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (full_for_fd(fd, "writev", NULL, 0, 1)) NO_ROOM;
    return REAL(writev)(fd, parts, count);
}

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *end, size_t size, unsigned flags) {
    if (full_for_fd(to, "copy_file_range", NULL, 0, 1)) NO_ROOM;
    return REAL(copy_file_range)(from, start, to, end, size, flags);
}

int fsync(int fd) {
    if (full_for_fd(fd, "fsync", NULL, 0, 1)) NO_ROOM;
    return REAL(fsync)(fd);
}

int ftruncate64(int fd, off64_t size) {
    if (full_for_fd(fd, "ftruncate", NULL, 0, 0)) NO_ROOM;
    return REAL(ftruncate64)(fd, size);
}

static mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? va_arg(rest, mode_t) : 0; }

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))

#define OPEN(name)                                                                                                    \
    int name(const char *path, int flags, ...) {                                                                      \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = mode_of(flags, rest);                                                                           \
        va_end(rest);                                                                                                 \
        if (CHANGES(flags) && full_for(AT_FDCWD, "open", path, !!(flags & O_CREAT))) NO_ROOM;                         \
        return REAL(name)(path, flags, mode);                                                                         \
    }

#define OPENAT(name)                                                                                                  \
    int name(int folder, const char *path, int flags, ...) {                                                          \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = mode_of(flags, rest);                                                                           \
        va_end(rest);                                                                                                 \
        if (CHANGES(flags) && full_for(folder, "open", path, !!(flags & O_CREAT))) NO_ROOM;                           \
        return REAL(name)(folder, path, flags, mode);                                                                 \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char *path, mode_t mode) {
    if (full_for(AT_FDCWD, "mkdir", path, 1)) NO_ROOM;
    return REAL(mkdir)(path, mode);
}

int rename(const char *from, const char *to) {
    if (full_for(AT_FDCWD, "rename", to, 0)) NO_ROOM;
    return REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    if (full_for(to_folder, "rename", to, 0)) NO_ROOM;
    return REAL(renameat)(from_folder, from, to_folder, to);
}

int unlink(const char *path) {
    if (full_for(AT_FDCWD, "unlink", path, 0)) NO_ROOM;
    return REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
    if (full_for(folder, flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, 0)) NO_ROOM;
    return REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
    if (full_for(AT_FDCWD, "rmdir", path, 0)) NO_ROOM;
    return REAL(rmdir)(path);
}

int chmod(const char *path, mode_t mode) {
    if (full_for(AT_FDCWD, "chmod", path, 0)) NO_ROOM;
    return REAL(chmod)(path, mode);
}
