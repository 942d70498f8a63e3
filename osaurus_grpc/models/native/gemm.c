/* Matrix products, in front of the BLAS.
 *
 * A decode step multiplies one row a stream by every weight matrix. General libraries first copy the
 * matrix into the order their kernels like, which for a few rows takes longer than the product. Here the
 * matrix is read once, where it lies, and while some of its rows are multiplied the next ones are fetched.
 * Products of many rows by deep matrices are left to the BLAS.
 *
 * Where a matrix is known to consist of shorter numbers (numbers.c), those are read in its place and unpacked in
 * registers: a product of few rows waits for memory, and its result is the same to the bit.
 *
 * Loaded before the BLAS, this library's cblas_sgemm is the one that MLX finds; what it does not do itself
 * goes on to the BLAS. Each element is summed in an order that depends on the depth alone, so a row's
 * result is the same whatever other rows there are.
 *
 * Needs AVX2, FMA and F16C; who loads it makes sure of them.
 */
#include <immintrin.h>
#include <stdatomic.h>

#include "kernels.h"
#include "numbers.h"

#define INTERFACE 4 /* Of the whole library, as native_kernels.py knows it. */
/* Up to so many rows this is faster than a BLAS: of matrices whose rows fit into the first-level cache,
 * together with those of a tile, and of others. */
#define SHALLOW 1024
#define MAX_ROWS_SHALLOW 512
#define MAX_ROWS 64
/* Up to so many rows a product is faster by shorter numbers, which have to be unpacked for every four of them: by
 * any, and by codes in groups. */
#define MAX_ROWS_SHORT 16
#define MAX_ROWS_AFFINE 8
/* Sums of more elements than DEEP are made of parts, while whose rows are near all tiles use them. */
#define DEEP 4096
#define PART 1024
#define LEAST_GROUP 32 /* Numbers of a scale, which parts and unrolled loops are multiples of. */
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
static atomic_long products, short_products;

int osaurus_interface(void) { return INTERFACE; }

/* What this library does not do itself, the given function does. Must be said before anything is asked. */
void osaurus_gemm_set_blas(sgemm other) { blas = other; }

/* Products done here since the start. */
long osaurus_gemm_products(void) { return atomic_load_explicit(&products, memory_order_relaxed); }

/* Those of them for which shorter numbers were read. */
long osaurus_gemm_short_products(void) { return atomic_load_explicit(&short_products, memory_order_relaxed); }

/* The sums of four vectors' elements. */
static inline __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/* c[m][n] = the dot product of row m of a and row n of b, added to what is there where `adds` says so.
 *
 * b begins at an element of some numbers. Kind, rows and columns are constants where this is called, so that all
 * sums stay in registers. Meanwhile the rows of b that lie `ahead` elements further are fetched, into the second
 * level of cache: the first has too few requests under way to keep memory busy. 0 fetches none.
 */
static inline __attribute__((always_inline)) void dots(const enum kind kind, const int rows,
                                                       const int columns, int adds, int depth, size_t ahead,
                                                       const float *a, size_t lda, const struct numbers *b,
                                                       size_t begin, size_t ldb, float *c, size_t ldc) {
  const __m256 none = _mm256_setzero_ps();
  const char *codes = b->codes;
  __m256 total[MAX_TILE_ROWS][MAX_TILE_COLUMNS];
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < columns; n++) total[m][n] = none;
  int k = 0;
  if (is_affine(kind)) {
    for (; k < depth; k += LEAST_GROUP) {
      UNROLL for (int n = 0; n < columns; n++) {
        const size_t at = begin + n * ldb + k, group = at >> b->group_shift;
        const __m256 scale = _mm256_broadcast_ss(b->scales + group);
        const __m256 bias = _mm256_broadcast_ss(b->biases + group);
        if (ahead) {
          const size_t next = at + ahead, next_group = next >> b->group_shift;
          _mm_prefetch(codes + bytes_before(kind, next), _MM_HINT_T1);
          _mm_prefetch((const char *)(b->scales + next_group), _MM_HINT_T1);
          _mm_prefetch((const char *)(b->biases + next_group), _MM_HINT_T1);
        }
        UNROLL for (int i = 0; i < LEAST_GROUP; i += LANES) {
          const __m256 right = eight(kind, codes, at + i, scale, bias);
          UNROLL for (int m = 0; m < rows; m++)
            total[m][n] = _mm256_fmadd_ps(_mm256_loadu_ps(a + m * lda + k + i), right, total[m][n]);
        }
      }
    }
  }
  for (; k + LANES <= depth; k += LANES) {
    __m256 right[MAX_TILE_COLUMNS];
    UNROLL for (int n = 0; n < columns; n++) {
      const size_t at = begin + n * ldb + k;
      right[n] = eight(kind, codes, at, none, none);
      if (ahead) _mm_prefetch(codes + bytes_before(kind, at + ahead), _MM_HINT_T1);
    }
    UNROLL for (int m = 0; m < rows; m++) {
      __m256 left = _mm256_loadu_ps(a + m * lda + k);
      UNROLL for (int n = 0; n < columns; n++) total[m][n] = _mm256_fmadd_ps(left, right[n], total[m][n]);
    }
  }
  float summed[MAX_TILE_ROWS][MAX_TILE_COLUMNS];
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < columns; n += 4)
    _mm_storeu_ps(summed[m] + n, sums(total[m][n], n + 1 < columns ? total[m][n + 1] : none,
                                      n + 2 < columns ? total[m][n + 2] : none,
                                      n + 3 < columns ? total[m][n + 3] : none));
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < columns; n++) {
      for (int rest = k; rest < depth; rest++)
        summed[m][n] = __builtin_fmaf(a[m * lda + rest], one(kind, codes, begin + n * ldb + rest), summed[m][n]);
      c[m * ldc + n] = adds ? c[m * ldc + n] + summed[m][n] : summed[m][n];
    }
}

typedef void (*tile)(int, int, size_t, const float *, size_t, const struct numbers *, size_t, size_t, float *,
                     size_t);

#define TILE(KIND, ROWS, COLUMNS)                                                                            \
  static void KIND##_##ROWS##x##COLUMNS(int adds, int depth, size_t ahead, const float *a, size_t lda,       \
                                        const struct numbers *b, size_t begin, size_t ldb, float *c,         \
                                        size_t ldc) {                                                        \
    dots(KIND, ROWS, COLUMNS, adds, depth, ahead, a, lda, b, begin, ldb, c, ldc);                            \
  }
#define TILES(KIND)                                                                                          \
  TILE(KIND, 1, 1)                                                                                           \
  TILE(KIND, 2, 1) TILE(KIND, 3, 1) TILE(KIND, 4, 1) TILE(KIND, 1, 8) TILE(KIND, 2, 4) TILE(KIND, 3, 3)      \
  TILE(KIND, 4, 3)

TILES(FLOAT32)
TILES(BFLOAT16)
TILES(FLOAT16)
TILES(AFFINE4)
TILES(AFFINE8)
TILES(AFFINE8_ROUNDED)

/* By kind and the rows of a tile: as many columns as sixteen registers allow, and one for what is left. */
#define BROAD(KIND) {NULL, KIND##_1x8, KIND##_2x4, KIND##_3x3, KIND##_4x3}
#define THIN(KIND) {NULL, KIND##_1x1, KIND##_2x1, KIND##_3x1, KIND##_4x1}
#define BY_KIND(SHAPES) \
  {SHAPES(FLOAT32), SHAPES(BFLOAT16), SHAPES(FLOAT16), SHAPES(AFFINE4), SHAPES(AFFINE8), SHAPES(AFFINE8_ROUNDED)}
static const tile broad[][MAX_TILE_ROWS + 1] = BY_KIND(BROAD);
static const tile thin[][MAX_TILE_ROWS + 1] = BY_KIND(THIN);
static const int widths[] = {0, 8, 4, 3, 3};

/* Columns that all rows are multiplied by while they are near. */
static int strip(int rows) { return rows > MAX_TILE_ROWS ? STRIP : widths[rows]; }

/* A product: c = a * b transposed, b from an element of its numbers on. */
struct product {
  int rows, columns, depth;
  const float *a;
  size_t lda;
  const struct numbers *b;
  size_t begin, ldb;
  float *c;
  size_t ldc;
};

/* A product to which all of a is near, to a part of its depth. */
static void strip_product(const struct product *of, int adds, size_t ahead) {
  for (int m = 0; m < of->rows; m += MAX_TILE_ROWS) {
    const int tall = of->rows - m < MAX_TILE_ROWS ? of->rows - m : MAX_TILE_ROWS;
    const size_t fetched = m == 0 ? ahead : 0; /* once */
    const float *a = of->a + m * of->lda;
    for (int n = 0, width; n < of->columns; n += width) {
      width = n + widths[tall] <= of->columns ? widths[tall] : 1;
      const tile multiply = (width > 1 ? broad : thin)[of->b->kind][tall];
      multiply(adds, of->depth, fetched, a, of->lda, of->b, of->begin + n * of->ldb, of->ldb,
               of->c + m * of->ldc + n, of->ldc);
    }
  }
}

static void multiply(const struct product *of) {
  const int step = strip(of->rows);
  const int parts = of->depth > DEEP ? (of->depth + PART - 1) / PART : 1;
  /* Of equal size, so that none is short. */
  const int part = parts > 1 ? (of->depth / parts + LEAST_GROUP) / LEAST_GROUP * LEAST_GROUP : of->depth;
  for (int first = 0; first < of->columns; first += step) {
    struct product piece = *of;
    piece.columns = of->columns - first < step ? of->columns - first : step;
    piece.c = of->c + first;
    for (int from = 0; from < of->depth; from += part) {
      piece.depth = of->depth - from < part ? of->depth - from : part;
      piece.a = of->a + from;
      piece.begin = of->begin + first * of->ldb + from;
      size_t ahead = 0;
      if (from + 2 * part <= of->depth)
        ahead = part;
      else if (first + 2 * step <= of->columns)
        ahead = step * of->ldb - from;
      strip_product(&piece, from > 0, ahead);
    }
  }
}

void osaurus_product(int rows, int columns, int depth, const float *a, size_t lda, const float *b, size_t ldb,
                     float *c, size_t ldc) {
  const struct numbers numbers = {b, NULL, NULL, FLOAT32, 0};
  multiply(&(struct product){rows, columns, depth, a, lda, &numbers, 0, ldb, c, ldc});
}

/* A product whose columns are divided. */
struct division {
  const struct product *whole;
  int width;
};

static void multiply_columns(const void *of, int piece) {
  const struct division *all = of;
  const int first = piece * all->width;
  struct product part = *all->whole;
  part.columns = part.columns - first < all->width ? part.columns - first : all->width;
  part.begin += first * part.ldb;
  part.c += first;
  multiply(&part);
}

/* A product on all threads. */
static void divide_product(const struct product *of) {
  const int threads = osaurus_threads();
  if (threads == 1 || (size_t)of->columns * of->depth < LEAST_DIVIDED) {
    multiply(of);
    return;
  }
  const int strips = (of->columns + STRIP - 1) / STRIP, least = threads * PIECES;
  const struct division all = {of, (strips < least ? 1 : strips / least) * STRIP};
  osaurus_divide(multiply_columns, &all, (of->columns + all.width - 1) / all.width);
}

static int max_rows(int depth) { return depth <= SHALLOW ? MAX_ROWS_SHALLOW : MAX_ROWS; }

/* As every BLAS has it: c = alpha * op(a) * op(b) + beta * c. */
void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  if (order == ROW_MAJOR && transpose_a == NO_TRANSPOSE && transpose_b == TRANSPOSE && m <= max_rows(k) &&
      k > 0 && alpha == 1.0f && beta == 0.0f) {
    atomic_fetch_add_explicit(&products, 1, memory_order_relaxed);
    const struct numbers whole = {b, NULL, NULL, FLOAT32, 0};
    const struct numbers *found = m <= MAX_ROWS_SHORT && ldb == k ? osaurus_short_of(b, n, k) : NULL;
    const int is_short = found && !(is_affine(found->kind) && m > MAX_ROWS_AFFINE);
    divide_product(&(struct product){m, n, k, a, lda, is_short ? found : &whole, 0, ldb, c, ldc});
    if (found) osaurus_short_done();
    if (is_short) atomic_fetch_add_explicit(&short_products, 1, memory_order_relaxed);
    return;
  }
  blas(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
