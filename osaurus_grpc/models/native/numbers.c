/* Matrices that are known to consist of shorter numbers.
 *
 * Models are published in bfloat16 or float16, or quantized, and computed with in float32, since that is what a CPU
 * has instructions for. Beside such a float32 matrix the numbers that it came from are kept; products of a few
 * rows, which take as long as the matrix takes to be read, read those.
 *
 * A matrix is known by its address, so whoever says what it consists of keeps both alive, and unchanged, until the
 * numbers are let go.
 */
#define _POSIX_C_SOURCE 200809L /* for pthread_rwlock_t */
#include "numbers.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct known {
  const float *matrix;
  int rows, columns;
  struct numbers numbers;
};

static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
/* Sorted by address. */
static struct known *all;
static size_t count, room;

/* The first place that is not before a matrix's. */
static size_t place_of(const float *matrix) {
  size_t first = 0, last = count;
  while (first < last) {
    const size_t middle = (first + last) / 2;
    if (all[middle].matrix < matrix)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

static int is_known(size_t at, const float *matrix) { return at < count && all[at].matrix == matrix; }

/* Write float32 numbers in 16 bits each. */
void osaurus_shorten(const float *numbers, size_t length, int kind, uint16_t *to) {
  for (size_t i = 0; i < length; i++) {
    uint32_t bits;
    memcpy(&bits, numbers + i, sizeof bits);
    to[i] = kind == BFLOAT16 ? bits >> 16 : _cvtss_sh(numbers[i], _MM_FROUND_TO_NEAREST_INT);
  }
}

/* Write the codes of whole groups of float32 numbers, a byte each; of numbers that have none it means nothing. */
void osaurus_encode(const float *numbers, size_t length, const float *scales, const float *biases,
                    int group_shift, uint8_t *to) {
  for (size_t i = 0; i < length; i += LANES) {
    const __m256 scale = _mm256_broadcast_ss(scales + (i >> group_shift));
    const __m256 bias = _mm256_broadcast_ss(biases + (i >> group_shift));
    const __m256 code = _mm256_div_ps(_mm256_sub_ps(_mm256_loadu_ps(numbers + i), bias), scale);
    const __m256i whole = _mm256_cvtps_epi32(code); /* the least number where it is none, as behind a scale of 0 */
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)(to + i), _mm_packus_epi16(words, words));
  }
}

static int is_same(const enum kind kind, const struct numbers *numbers, const float *matrix, size_t length) {
  size_t at = 0;
  for (; at + LANES <= length; at += LANES) {
    __m256 scale = _mm256_setzero_ps(), bias = scale;
    if (is_affine(kind)) {
      scale = _mm256_broadcast_ss(numbers->scales + (at >> numbers->group_shift));
      bias = _mm256_broadcast_ss(numbers->biases + (at >> numbers->group_shift));
    }
    const __m256i mine = _mm256_castps_si256(eight(kind, numbers->codes, at, scale, bias));
    const __m256i theirs = _mm256_loadu_si256((const __m256i *)(matrix + at));
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi32(mine, theirs)) != -1) return 0;
  }
  for (; at < length; at++) {
    const float mine = one(kind, numbers->codes, at);
    if (memcmp(&mine, matrix + at, sizeof mine) != 0) return 0;
  }
  return 1;
}

/* Whether the first so many numbers are those of a float32 matrix, to the bit. */
int osaurus_is_same(const struct numbers *numbers, const float *matrix, size_t length) {
  switch (numbers->kind) {
    case BFLOAT16: return is_same(BFLOAT16, numbers, matrix, length);
    case FLOAT16: return is_same(FLOAT16, numbers, matrix, length);
    case AFFINE4: return is_same(AFFINE4, numbers, matrix, length);
    case AFFINE8: return is_same(AFFINE8, numbers, matrix, length);
    case AFFINE8_ROUNDED: return is_same(AFFINE8_ROUNDED, numbers, matrix, length);
  }
  return 0;
}

/* Say what a contiguous matrix consists of, of which nothing is copied; returns whether it is taken. */
int osaurus_hold(const float *matrix, int rows, int columns, const struct numbers *numbers) {
  int is_held = 0;
  pthread_rwlock_wrlock(&lock);
  if (count == room) {
    const size_t more = room ? 2 * room : 256;
    struct known *larger = realloc(all, more * sizeof *all);
    if (larger) {
      all = larger;
      room = more;
    }
  }
  const size_t at = place_of(matrix);
  if (count < room && !is_known(at, matrix)) {
    memmove(all + at + 1, all + at, (count - at) * sizeof *all);
    all[at] = (struct known){matrix, rows, columns, *numbers};
    count++;
    is_held = 1;
  }
  pthread_rwlock_unlock(&lock);
  return is_held;
}

/* Let a matrix's numbers go; when it returns, nobody reads them any more. */
void osaurus_let_go(const float *matrix) {
  pthread_rwlock_wrlock(&lock);
  const size_t at = place_of(matrix);
  if (is_known(at, matrix)) {
    memmove(all + at, all + at + 1, (count - at - 1) * sizeof *all);
    count--;
  }
  pthread_rwlock_unlock(&lock);
}

const struct numbers *osaurus_short_of(const float *matrix, int rows, int columns) {
  pthread_rwlock_rdlock(&lock);
  const size_t at = place_of(matrix);
  if (is_known(at, matrix) && all[at].rows == rows && all[at].columns == columns) return &all[at].numbers;
  pthread_rwlock_unlock(&lock);
  return NULL;
}

void osaurus_short_done(void) { pthread_rwlock_unlock(&lock); }
