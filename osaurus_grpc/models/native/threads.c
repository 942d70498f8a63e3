/* Work divided among threads.
 *
 * Whoever has work hands it out in pieces and takes pieces itself until none is left; threads that come late
 * find nothing and cost nothing. Idle threads sleep, since servers use the same cores.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "kernels.h"

#define MAX_THREADS 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t has_work = PTHREAD_COND_INITIALIZER, is_left = PTHREAD_COND_INITIALIZER;
/* All of these but `next` are guarded by the lock. */
static int wanted = 1, helpers = 0;
static int is_busy = 0, inside = 0;
static osaurus_task task;
static const void *argument;
static int pieces = 0;
static atomic_int next;

static void take_pieces(osaurus_task do_piece, const void *of, int count) {
  for (int piece; (piece = atomic_fetch_add(&next, 1)) < count;) do_piece(of, piece);
}

static void *help(void *number) {
  const int own = (int)(intptr_t)number;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (!(is_busy && own < wanted && atomic_load(&next) < pieces)) pthread_cond_wait(&has_work, &lock);
    const osaurus_task do_piece = task;
    const void *of = argument;
    const int count = pieces;
    inside++;
    pthread_mutex_unlock(&lock);
    take_pieces(do_piece, of, count);
    pthread_mutex_lock(&lock);
    if (--inside == 0) pthread_cond_signal(&is_left);
  }
  return NULL;
}

/* How many threads work on one thing, the caller's included. */
void osaurus_set_threads(int threads) {
  sigset_t all, before;
  pthread_mutex_lock(&lock);
  wanted = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
  /* Signals are for the threads of the program. */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (helpers < wanted - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(helpers + 1)) != 0) break;
    pthread_detach(thread);
    helpers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_mutex_unlock(&lock);
}

void osaurus_divide(osaurus_task do_piece, const void *of, int count) {
  int is_divided = 0;
  pthread_mutex_lock(&lock);
  if (!is_busy && wanted > 1 && helpers > 0 && count > 1) {
    is_divided = is_busy = 1;
    task = do_piece;
    argument = of;
    pieces = count;
    atomic_store(&next, 0);
    pthread_cond_broadcast(&has_work);
  }
  pthread_mutex_unlock(&lock);
  if (!is_divided) { /* alone, or somebody else has the others */
    for (int piece = 0; piece < count; piece++) do_piece(of, piece);
    return;
  }
  take_pieces(do_piece, of, count);
  pthread_mutex_lock(&lock);
  while (inside > 0) pthread_cond_wait(&is_left, &lock);
  is_busy = 0;
  pthread_mutex_unlock(&lock);
}

int osaurus_threads(void) {
  pthread_mutex_lock(&lock);
  const int threads = helpers < wanted ? helpers + 1 : wanted;
  pthread_mutex_unlock(&lock);
  return threads;
}
