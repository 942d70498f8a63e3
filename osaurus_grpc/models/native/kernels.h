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

/* Does one piece of what is worked on. */
typedef void (*osaurus_task)(const void *of, int piece);

/* Do all pieces, from 0 on, on as many threads as osaurus_set_threads() allows; returns when all are done. */
void osaurus_divide(osaurus_task do_piece, const void *of, int count);

/* Threads that may work on one thing. */
int osaurus_threads(void);

#endif
