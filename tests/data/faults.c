/* Counts the calls that change what is below a folder, and lets the n-th of them go wrong.

   A process that has this library preloaded behaves as without it until faults_arm is called. The
   calls are those of the C library, by which Python, numpy, torch and safetensors (Rust) write. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITES = 1, MAKES = 2, OTHERS = 4 };
enum { NOTHING, SIGNAL, FAIL, SHORT, HALF_THEN_SIGNAL };
enum { PASS, REFUSE, CUT, CUT_THEN_SIGNAL };

static struct {
    char root[PATH_MAX];
    size_t length;
    int kinds, how, value, lasting, log;
    long at, count;
} plan;
static int armed;

/* Everything below `root` counts. The `at`-th call of one of `kinds` does `how`, with a signal or
   an errno as `value`; a `lasting` fault comes back at each later call. Every call is a line of
   the descriptor `log`, if that is not negative. */
void faults_arm(const char *root, long at, int kinds, int how, int value, int lasting, int log) {
    armed = 0;
    snprintf(plan.root, sizeof plan.root, "%s", root);
    plan.length = strlen(plan.root);
    plan.at = at, plan.kinds = kinds, plan.how = how, plan.value = value;
    plan.lasting = lasting, plan.log = log, plan.count = 0;
    armed = 1;
}

long faults_count(void) { return plan.count; }

void faults_disarm(void) { armed = 0; }

static void place_of(int descriptor, char *place) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, place, PATH_MAX - 1);
    place[length > 0 ? length : 0] = 0;
}

static int decide(const char *name, int kind, const char *place, long bytes) {
    if (strncmp(place, plan.root, plan.length) || (place[plan.length] && place[plan.length] != '/'))
        return PASS;
    if (plan.log >= 0) {
        char line[2 * PATH_MAX];
        snprintf(line, sizeof line, "%s %d %ld %s", name, kind, bytes, place + plan.length);
        for (char *each = line; *each; each++)
            if (*each < ' ')
                *each = '?'; /* a name may have line breaks */
        dprintf(plan.log, "%s\n", line);
    }
    if (!(kind & plan.kinds))
        return PASS;
    long number = __atomic_add_fetch(&plan.count, 1, __ATOMIC_SEQ_CST);
    if (number != plan.at && !(plan.lasting && number > plan.at))
        return PASS;
    switch (plan.how) {
    case SIGNAL:
        kill(getpid(), plan.value);
        return PASS;
    case FAIL:
        errno = plan.value;
        return REFUSE;
    case SHORT:
        return kind == WRITES ? CUT : PASS;
    case HALF_THEN_SIGNAL:
        if (kind == WRITES)
            return CUT_THEN_SIGNAL;
        kill(getpid(), plan.value);
    }
    return PASS;
}

static int at_descriptor(const char *name, int kind, int descriptor, long bytes) {
    char place[PATH_MAX];
    if (!armed)
        return PASS;
    int before = errno;
    place_of(descriptor, place);
    errno = before;
    return decide(name, kind, place, bytes);
}

static int at_path(const char *name, int kind, int folder, const char *path) {
    char place[PATH_MAX], joined[2 * PATH_MAX];
    if (!armed || !path)
        return PASS;
    if (path[0] == '/')
        return decide(name, kind, path, 0);
    int before = errno;
    if (folder == AT_FDCWD) {
        if (!getcwd(place, sizeof place))
            place[0] = 0;
    } else
        place_of(folder, place);
    errno = before;
    snprintf(joined, sizeof joined, "%s/%s", place, path);
    return decide(name, kind, joined, 0);
}

static size_t half(size_t bytes) { return bytes > 1 ? bytes / 2 : bytes; }

#define REAL(name)                                       \
    static __typeof__(name) *real;                       \
    if (!real)                                           \
    real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* --- opening ------------------------------------------------------------------------------------ */

static int makes(int flags) {
    return flags & (O_CREAT | O_TRUNC) || (flags & O_ACCMODE) != O_RDONLY ? MAKES : OTHERS;
}

#define MODE                                                             \
    mode_t mode = 0;                                                     \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {           \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode = va_arg(rest, mode_t);                                     \
        va_end(rest);                                                    \
    }

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...) {                         \
        MODE;                                                            \
        REAL(name);                                                      \
        if (at_path(#name, makes(flags), AT_FDCWD, path) == REFUSE)      \
            return -1;                                                   \
        return real(path, flags, mode);                                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
    int name(int folder, const char *path, int flags, ...) {             \
        MODE;                                                            \
        REAL(name);                                                      \
        if (at_path(#name, makes(flags), folder, path) == REFUSE)        \
            return -1;                                                   \
        return real(folder, path, flags, mode);                          \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                              \
    FILE *name(const char *path, const char *how) {                              \
        REAL(name);                                                              \
        if (at_path(#name, how[0] == 'r' ? OTHERS : MAKES, AT_FDCWD, path) == REFUSE) \
            return NULL;                                                         \
        return real(path, how);                                                  \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* --- writing ------------------------------------------------------------------------------------ */

#define WRITING(name, result, declared, given, target, bytes)            \
    result name declared {                                               \
        REAL(name);                                                      \
        int decision = at_descriptor(#name, WRITES, target, bytes);      \
        if (decision == REFUSE)                                          \
            return -1;                                                   \
        if (decision >= CUT)                                             \
            bytes = half(bytes);                                         \
        result written = real given;                                     \
        if (decision == CUT_THEN_SIGNAL)                                 \
            kill(getpid(), plan.value);                                  \
        return written;                                                  \
    }
WRITING(write, ssize_t, (int file, const void *from, size_t n), (file, from, n), file, n)
WRITING(pwrite, ssize_t, (int file, const void *from, size_t n, off_t at), (file, from, n, at),
        file, n)
WRITING(pwrite64, ssize_t, (int file, const void *from, size_t n, off64_t at), (file, from, n, at),
        file, n)
WRITING(sendfile, ssize_t, (int file, int from, off_t *at, size_t n), (file, from, at, n), file, n)
WRITING(sendfile64, ssize_t, (int file, int from, off64_t *at, size_t n), (file, from, at, n), file,
        n)
WRITING(copy_file_range, ssize_t,
        (int from, off64_t *a, int file, off64_t *b, size_t n, unsigned flags),
        (from, a, file, b, n, flags), file, n)

/* Of several buffers, the first alone is written where a write is to be short. */
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    long bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += parts[i].iov_len;
    int decision = at_descriptor("writev", WRITES, file, bytes);
    if (decision == REFUSE)
        return -1;
    ssize_t written = real(file, parts, decision >= CUT ? 1 : count);
    if (decision == CUT_THEN_SIGNAL)
        kill(getpid(), plan.value);
    return written;
}

/* --- the rest ----------------------------------------------------------------------------------- */

#define ON_FILE(name, kind, declared, given)                             \
    int name declared {                                                  \
        REAL(name);                                                      \
        return at_descriptor(#name, kind, file, 0) == REFUSE ? -1 : real given; \
    }
ON_FILE(fsync, OTHERS, (int file), (file))
ON_FILE(fdatasync, OTHERS, (int file), (file))
ON_FILE(close, OTHERS, (int file), (file))
ON_FILE(ftruncate, MAKES, (int file, off_t size), (file, size))
ON_FILE(ftruncate64, MAKES, (int file, off64_t size), (file, size))
ON_FILE(fallocate, MAKES, (int file, int how, off_t from, off_t size), (file, how, from, size))

#define ON_PATH(name, kind, declared, given, folder, path)               \
    int name declared {                                                  \
        REAL(name);                                                      \
        return at_path(#name, kind, folder, path) == REFUSE ? -1 : real given; \
    }
ON_PATH(mkdir, MAKES, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(mkdirat, MAKES, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
ON_PATH(rename, MAKES, (const char *path, const char *to), (path, to), AT_FDCWD, to)
ON_PATH(renameat, MAKES, (int a, const char *path, int b, const char *to), (a, path, b, to), b, to)
ON_PATH(renameat2, MAKES, (int a, const char *path, int b, const char *to, unsigned flags),
        (a, path, b, to, flags), b, to)
ON_PATH(link, MAKES, (const char *path, const char *to), (path, to), AT_FDCWD, to)
ON_PATH(linkat, MAKES, (int a, const char *path, int b, const char *to, int flags),
        (a, path, b, to, flags), b, to)
ON_PATH(symlink, MAKES, (const char *path, const char *to), (path, to), AT_FDCWD, to)
ON_PATH(truncate, MAKES, (const char *path, off_t size), (path, size), AT_FDCWD, path)
ON_PATH(chmod, OTHERS, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(unlink, OTHERS, (const char *path), (path), AT_FDCWD, path)
ON_PATH(unlinkat, OTHERS, (int at, const char *path, int flags), (at, path, flags), at, path)
ON_PATH(rmdir, OTHERS, (const char *path), (path), AT_FDCWD, path)

/* --- the clocks --------------------------------------------------------------------------------- */

static long jump_after = -1, jump_real, jump_monotonic;

/* After `after` looks at a clock, that of the day is off by `real` seconds, others by `monotonic`. */
void faults_clock(long after, long real, long monotonic) {
    jump_real = real, jump_monotonic = monotonic, jump_after = after;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static long looks;
    REAL(clock_gettime);
    int status = real(clock, now);
    if (!status && jump_after >= 0 && __atomic_add_fetch(&looks, 1, __ATOMIC_SEQ_CST) > jump_after) {
        if (clock == CLOCK_REALTIME)
            now->tv_sec += jump_real;
        else if (clock == CLOCK_MONOTONIC || clock == CLOCK_BOOTTIME)
            now->tv_sec += jump_monotonic;
    }
    return status;
}
