/* Matrix products, in front of the BLAS.
 *
 * A decode step multiplies one row a stream by every weight matrix. General libraries first copy the
 * matrix into the order their kernels like, which for a few rows takes longer than the product. Here the
 * matrix is read once, where it lies, and while some of its rows are multiplied the next ones are fetched.
 * Products of many rows by deep matrices are left to the BLAS.
 *
 * Loaded before the BLAS, this library's cblas_sgemm is the one that MLX finds; what it does not do itself
 * goes on to the BLAS. Each element is summed in an order that depends on the depth alone, so a row's
 * result is the same whatever other rows there are.
 *
 * Needs AVX2 and FMA; who loads it makes sure of them.
 */
#include <immintrin.h>
#include <stdatomic.h>

#include "kernels.h"

#define INTERFACE 3 /* Of the whole library, as native_kernels.py knows it. */
/* Up to so many rows this is faster than a BLAS: of matrices whose rows fit into the first-level cache,
 * together with those of a tile, and of others. */
#define SHALLOW 1024
#define MAX_ROWS_SHALLOW 512
#define MAX_ROWS 64
/* Sums of more elements than DEEP are made of parts, while whose rows are near all tiles use them. */
#define DEEP 4096
#define PART 1024
#define MAX_TILE_ROWS 4
#define MAX_TILE_COLUMNS 8
#define STRIP 48 /* Columns; a multiple of every tile's width. */
/* Elements of a matrix from which other threads are woken up for it, and pieces for each of them. */
#define LEAST_DIVIDED (1 << 17)
#define PIECES 3

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112 };

typedef void (*sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float,
                      float *, int);

static sgemm blas;
static atomic_long products;

int osaurus_interface(void) { return INTERFACE; }

/* What this library does not do itself, the given function does. Must be said before anything is asked. */
void osaurus_gemm_set_blas(sgemm other) { blas = other; }

/* Products done here since the start. */
long osaurus_gemm_products(void) { return atomic_load_explicit(&products, memory_order_relaxed); }

/* The sums of four vectors' elements. */
static inline __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/* c[m][n] = the dot product of row m of a and row n of b, added to what is there where `adds` says so.
 *
 * Rows and columns are constants where this is called, so that all sums stay in registers. Meanwhile the
 * rows of b that lie `ahead` elements further are fetched; 0 fetches none.
 */
static inline __attribute__((always_inline)) void dots(const int rows, const int columns, int adds,
                                                       int depth, size_t ahead, const float *a, size_t lda,
                                                       const float *b, size_t ldb, float *c, size_t ldc) {
  __m256 total[MAX_TILE_ROWS][MAX_TILE_COLUMNS];
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < columns; n++)
    total[m][n] = _mm256_setzero_ps();
  int k = 0;
  for (; k + LANES <= depth; k += LANES) {
    __m256 right[MAX_TILE_COLUMNS];
    UNROLL for (int n = 0; n < columns; n++) {
      right[n] = _mm256_loadu_ps(b + n * ldb + k);
      /* Into the second level: the first has too few requests under way to keep memory busy. */
      if (ahead) _mm_prefetch((const char *)(b + n * ldb + k + ahead), _MM_HINT_T1);
    }
    UNROLL for (int m = 0; m < rows; m++) {
      __m256 left = _mm256_loadu_ps(a + m * lda + k);
      UNROLL for (int n = 0; n < columns; n++) total[m][n] = _mm256_fmadd_ps(left, right[n], total[m][n]);
    }
  }
  float summed[MAX_TILE_ROWS][MAX_TILE_COLUMNS];
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < columns; n += 4) {
    const __m256 none = _mm256_setzero_ps();
    _mm_storeu_ps(summed[m] + n, sums(total[m][n], n + 1 < columns ? total[m][n + 1] : none,
                                      n + 2 < columns ? total[m][n + 2] : none,
                                      n + 3 < columns ? total[m][n + 3] : none));
  }
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < columns; n++) {
      for (int rest = k; rest < depth; rest++)
        summed[m][n] = __builtin_fmaf(a[m * lda + rest], b[n * ldb + rest], summed[m][n]);
      c[m * ldc + n] = adds ? c[m * ldc + n] + summed[m][n] : summed[m][n];
    }
}

typedef void (*tile)(int, int, size_t, const float *, size_t, const float *, size_t, float *, size_t);

#define TILE(ROWS, COLUMNS)                                                                             \
  static void tile_##ROWS##x##COLUMNS(int adds, int depth, size_t ahead, const float *a, size_t lda,    \
                                      const float *b, size_t ldb, float *c, size_t ldc) {               \
    dots(ROWS, COLUMNS, adds, depth, ahead, a, lda, b, ldb, c, ldc);                                          \
  }

TILE(1, 1)
TILE(2, 1)
TILE(3, 1)
TILE(4, 1)
TILE(1, 8)
TILE(2, 4)
TILE(3, 3)
TILE(4, 3)

/* By the rows of a tile: as many columns as sixteen registers allow, and one for what is left. */
static const tile wide[] = {NULL, tile_1x8, tile_2x4, tile_3x3, tile_4x3};
static const tile narrow[] = {NULL, tile_1x1, tile_2x1, tile_3x1, tile_4x1};
static const int widths[] = {0, 8, 4, 3, 3};

/* Columns that all rows are multiplied by while they are near. */
static int strip(int rows) { return rows > MAX_TILE_ROWS ? STRIP : widths[rows]; }

/* A strip's product to a part of its depth. */
static void strip_product(int rows, int columns, int adds, int depth, size_t ahead, const float *a, size_t lda,
                          const float *b, size_t ldb, float *c, size_t ldc) {
  for (int m = 0; m < rows; m += MAX_TILE_ROWS) {
    const int tall = rows - m < MAX_TILE_ROWS ? rows - m : MAX_TILE_ROWS;
    const size_t fetched = m == 0 ? ahead : 0; /* once */
    int n = 0;
    for (; n + widths[tall] <= columns; n += widths[tall])
      wide[tall](adds, depth, fetched, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc);
    for (; n < columns; n++)
      narrow[tall](adds, depth, fetched, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc);
  }
}

void osaurus_product(int rows, int columns, int depth, const float *a, size_t lda, const float *b, size_t ldb,
                     float *c, size_t ldc) {
  const int step = strip(rows);
  const int parts = depth > DEEP ? (depth + PART - 1) / PART : 1;
  /* Of equal size, so that none is short. */
  const int part = parts > 1 ? (depth / parts + LANES) / LANES * LANES : depth;
  for (int first = 0; first < columns; first += step) {
    const int width = columns - first < step ? columns - first : step;
    for (int from = 0; from < depth; from += part) {
      const int deep = depth - from < part ? depth - from : part;
      size_t ahead = 0;
      if (from + 2 * part <= depth)
        ahead = part;
      else if (first + 2 * step <= columns)
        ahead = step * ldb - from;
      strip_product(rows, width, from > 0, deep, ahead, a + from, lda, b + first * ldb + from, ldb,
                    c + first, ldc);
    }
  }
}

/* A product whose columns are divided. */
struct division {
  int rows, columns, depth, width;
  const float *a, *b;
  size_t lda, ldb, ldc;
  float *c;
};

static void multiply_columns(const void *of, int piece) {
  const struct division *all = of;
  const int first = piece * all->width;
  const int width = all->columns - first < all->width ? all->columns - first : all->width;
  osaurus_product(all->rows, width, all->depth, all->a, all->lda, all->b + first * all->ldb, all->ldb,
                  all->c + first, all->ldc);
}

/* A product on all threads. */
static void divided_product(int rows, int columns, int depth, const float *a, size_t lda, const float *b,
                            size_t ldb, float *c, size_t ldc) {
  const int threads = osaurus_threads();
  if (threads == 1 || (size_t)columns * depth < LEAST_DIVIDED) {
    osaurus_product(rows, columns, depth, a, lda, b, ldb, c, ldc);
    return;
  }
  const int strips = (columns + STRIP - 1) / STRIP, least = threads * PIECES;
  const int width = (strips < least ? 1 : strips / least) * STRIP;
  const struct division all = {rows, columns, depth, width, a, b, lda, ldb, ldc, c};
  osaurus_divide(multiply_columns, &all, (columns + width - 1) / width);
}

static int max_rows(int depth) { return depth <= SHALLOW ? MAX_ROWS_SHALLOW : MAX_ROWS; }

/* As every BLAS has it: c = alpha * op(a) * op(b) + beta * c. */
void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  if (order == ROW_MAJOR && transpose_a == NO_TRANSPOSE && transpose_b == TRANSPOSE && m <= max_rows(k) &&
      k > 0 && alpha == 1.0f && beta == 0.0f) {
    atomic_fetch_add_explicit(&products, 1, memory_order_relaxed);
    divided_product(m, n, k, a, lda, b, ldb, c, ldc);
    return;
  }
  blas(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
