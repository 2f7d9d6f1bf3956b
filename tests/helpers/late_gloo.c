/* A loaded machine, made certain: while LATE_MS is set, a worker thread of gloo's that has said that
   a collective is done goes on, to free its tensors, so many ms later or once LATE_NOW is set.
   Preloaded by exits_worker.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

typedef int (*broadcast_t)(pthread_cond_t *);

int pthread_cond_broadcast(pthread_cond_t *condition) {
  static broadcast_t original;
  static __thread int told;
  char name[17] = "";
  if (!original) original = (broadcast_t)dlvsym(RTLD_NEXT, "pthread_cond_broadcast", "GLIBC_2.3.2");
  if (!original) original = (broadcast_t)dlsym(RTLD_NEXT, "pthread_cond_broadcast");
  int answer = original(condition);
  if (prctl(PR_GET_NAME, name) != 0 || strcmp(name, "pt_gloo_runloop") != 0) return answer;
  /* Twice for a collective: its future is told first, then who waits for itself. */
  const char *late = getenv("LATE_MS");
  if (++told % 2 == 0 && late)
    for (int ms = atoi(late); ms > 0 && !getenv("LATE_NOW"); ms--) usleep(1000);
  return answer;
}
