/* A wrong clock for one process: while the file $FAULTS_CLOCK exists, the time of day is BACK seconds back. The other
   clocks go on. Loaded by LD_PRELOAD. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long back(void) { return access(getenv("FAULTS_CLOCK"), F_OK) == 0 ? BACK : 0; }

int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, now);
    if (!failed && which == CLOCK_REALTIME) now->tv_sec -= back();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    int failed = clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *found) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (found) *found = fine.tv_sec;
    return fine.tv_sec;
}
