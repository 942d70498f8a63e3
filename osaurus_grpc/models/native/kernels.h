/* What the files of this library share. */
#ifndef OSAURUS_KERNELS_H
#define OSAURUS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define LANES 8 /* Floats in a vector register. */
/* Before a loop of constant length: what it keeps in an array then stays in registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* c = a * b transposed, all row-major: c[m][n] is the dot product of row m of a and row n of b.
 *
 * The rows of each matrix are lda, ldb and ldc elements apart. How an element is summed depends on the
 * depth alone.
 */
void osaurus_product(int rows, int columns, int depth, const float *a, size_t lda, const float *b, size_t ldb,
                     float *c, size_t ldc);

/* How a matrix's numbers are held: as they are, in 16 bits, or as MLX's affine quantization packs them, codes of
 * 4 or 8 bits of which one is worth scale * code + bias; rounded once or, ROUNDED, behind the product too. */
enum kind { FLOAT32, BFLOAT16, FLOAT16, AFFINE4, AFFINE8, AFFINE8_ROUNDED };

/* The numbers of a matrix, row by row; scales and biases, where there are any, each of as many numbers as 2 to the
 * power of group_shift, at least 32. */
struct numbers {
  const void *codes;
  const float *scales, *biases;
  int32_t kind, group_shift;
};

/* The shorter numbers that a float32 matrix is known to consist of, which stay until osaurus_short_done() is
 * called; NULL where there are none, and then it must not be called. */
const struct numbers *osaurus_short_of(const float *matrix, int rows, int columns);
void osaurus_short_done(void);

/* Does one piece of what is worked on. */
typedef void (*osaurus_task)(const void *of, int piece);

/* Do all pieces, from 0 on, on as many threads as osaurus_set_threads() allows; returns when all are done. */
void osaurus_divide(osaurus_task do_piece, const void *of, int count);

/* Threads that may work on one thing. */
int osaurus_threads(void);

#endif
