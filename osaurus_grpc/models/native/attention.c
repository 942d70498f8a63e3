/* Attention and SwiGLU of float32 on a CPU.
 *
 * Scores, their softmax and the sum of values are done for a block of queries and a block of keys at a
 * time, while both are in the processor's caches; no matrix of all scores is ever made (the online softmax
 * of Milakov and Gimelshein, 2018, as FlashAttention uses it). For many queries a block of keys is
 * transposed first, which saves more than it costs. Blocks of keys begin at multiples of their size, and keys
 * that a query does not see add exact zeros, so a query's result depends neither on the other rows of its
 * batch nor on the padding behind its last key.
 *
 * Needs AVX2 and FMA; who loads it makes sure of them.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define QUERY_BLOCK 48
#define MANY_QUERIES 16 /* From here on transposed keys pay. */
#define KEY_BLOCK 64
#define MAX_DIM 256
#define TILE_ROWS 6
#define LEAST_DIVIDED 2e6 /* Multiplications from which other threads are woken up. */

/* What osaurus_attention() works on, as native_kernels.py lays it out. Strides count elements. */
struct attention {
  const float *queries; /* (rows, heads, queries, dim), contiguous. */
  const float *keys;    /* (rows, kv_heads, keys, dim), the last axis contiguous. */
  const float *values;  /* (rows, kv_heads, keys, value_dim), the last axis contiguous. */
  const uint8_t *mask;  /* What is seen, (rows, queries, keys), the last axis contiguous; NULL where all is. */
  float *out;           /* (rows, heads, queries, value_dim), contiguous. */
  int64_t key_row, key_head, key_token;
  int64_t value_row, value_head, value_token;
  int64_t mask_row, mask_query;
  int32_t rows, heads, kv_heads, query_count, key_count, dim, value_dim;
  int32_t is_causal; /* The last query sees all keys, the one before it all but the last, and so on. */
  float scale;
};

/* e to the power of each element, within 2 units in the last place; 0 below the smallest normal number. */
static inline __m256 exponentials(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-87.33654f), highest = _mm256_set1_ps(88.3762f);
  const __m256 is_zero = _mm256_cmp_ps(x, lowest, _CMP_LT_OQ);
  x = _mm256_min_ps(_mm256_max_ps(x, lowest), highest);
  const __m256 power = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  /* ln 2 in two parts, the first of which has few bits, so that what is left is exact. */
  __m256 rest = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), x);
  rest = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), rest);
  /* The series of e^x, which seven terms give to float32 for |x| <= ln 2 / 2. */
  __m256 sum = _mm256_set1_ps(1.0f / 5040.0f);
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(1.0f / 720.0f));
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(1.0f / 120.0f));
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(1.0f / 24.0f));
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(1.0f / 6.0f));
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(0.5f));
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(1.0f));
  sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23);
  return _mm256_andnot_ps(is_zero, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), exponent)));
}

static inline float exponential(float x) { return _mm256_cvtss_f32(exponentials(_mm256_set1_ps(x))); }

static inline float largest(__m256 x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

static inline float total(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* out[m][...] += the sum over i of weights[m][i] * values[i][...], for vectors * LANES columns. */
static inline __attribute__((always_inline)) void mix(const int rows, const int vectors, int count,
                                                      const float *weights, size_t ld_weights,
                                                      const float *values, size_t ld_values, float *out,
                                                      size_t ld_out) {
  __m256 sum[TILE_ROWS][4];
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < vectors; n++)
    sum[m][n] = _mm256_loadu_ps(out + m * ld_out + n * LANES);
  for (int i = 0; i < count; i++) {
    __m256 value[4];
    UNROLL for (int n = 0; n < vectors; n++) value[n] = _mm256_loadu_ps(values + i * ld_values + n * LANES);
    UNROLL for (int m = 0; m < rows; m++) {
      const __m256 weight = _mm256_broadcast_ss(weights + m * ld_weights + i);
      UNROLL for (int n = 0; n < vectors; n++) sum[m][n] = _mm256_fmadd_ps(weight, value[n], sum[m][n]);
    }
  }
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < vectors; n++)
    _mm256_storeu_ps(out + m * ld_out + n * LANES, sum[m][n]);
}

typedef void (*mixing)(int, const float *, size_t, const float *, size_t, float *, size_t);

#define MIX(ROWS, VECTORS)                                                                                \
  static void mix_##ROWS##x##VECTORS(int count, const float *weights, size_t ld_weights,                  \
                                     const float *values, size_t ld_values, float *out, size_t ld_out) {  \
    mix(ROWS, VECTORS, count, weights, ld_weights, values, ld_values, out, ld_out);                       \
  }

MIX(1, 1)
MIX(2, 1)
MIX(3, 1)
MIX(4, 1)
MIX(5, 1)
MIX(6, 1)
MIX(1, 4)
MIX(2, 4)
MIX(3, 4)
MIX(4, 2)
MIX(5, 2)
MIX(6, 2)

/* By the rows of a tile: as many vectors as sixteen registers allow, and one for what is left. */
static const mixing wide[] = {NULL, mix_1x4, mix_2x4, mix_3x4, mix_4x2, mix_5x2, mix_6x2};
static const mixing narrow[] = {NULL, mix_1x1, mix_2x1, mix_3x1, mix_4x1, mix_5x1, mix_6x1};
static const int widths[] = {0, 4, 4, 4, 2, 2, 2};

/* out += weights * values, all row-major; columns are a multiple of LANES. */
static void add_product(int rows, int columns, int depth, const float *weights, size_t ld_weights,
                        const float *values, size_t ld_values, float *out, size_t ld_out) {
  for (int m = 0; m < rows; m += TILE_ROWS) {
    const int tall = rows - m < TILE_ROWS ? rows - m : TILE_ROWS;
    const float *own = weights + m * ld_weights;
    int n = 0;
    for (; n + widths[tall] * LANES <= columns; n += widths[tall] * LANES)
      wide[tall](depth, own, ld_weights, values + n, ld_values, out + m * ld_out + n, ld_out);
    for (; n < columns; n += LANES)
      narrow[tall](depth, own, ld_weights, values + n, ld_values, out + m * ld_out + n, ld_out);
  }
}

static inline void transpose_square(const float *from, size_t ld_from, float *to, size_t ld_to) {
  __m256 row[LANES], pair[LANES];
  UNROLL for (int i = 0; i < LANES; i++) row[i] = _mm256_loadu_ps(from + i * ld_from);
  UNROLL for (int i = 0; i < LANES; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  UNROLL for (int i = 0; i < LANES; i += 4) {
    row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}

/* to[d][key] = from[key][d]; up to a whole vector of keys what lies behind the last one is zero. */
static void transpose(int keys, int dim, const float *from, size_t ld_from, float *to, size_t ld_to) {
  const int whole_keys = keys / LANES * LANES, whole_dim = dim / LANES * LANES;
  for (int key = 0; key < whole_keys; key += LANES) {
    for (int d = 0; d < whole_dim; d += LANES)
      transpose_square(from + key * ld_from + d, ld_from, to + d * ld_to + key, ld_to);
    for (int d = whole_dim; d < dim; d++)
      for (int i = 0; i < LANES; i++) to[d * ld_to + key + i] = from[(key + i) * ld_from + d];
  }
  if (whole_keys < keys)
    for (int d = 0; d < dim; d++)
      for (int i = 0; i < LANES; i++)
        to[d * ld_to + whole_keys + i] = whole_keys + i < keys ? from[(whole_keys + i) * ld_from + d] : 0.0f;
}

/* scores[m][key] = the dot product of a query and a key, KEY_BLOCK apart. */
static void score(int queries, int keys, int dim, const float *query, const float *key, size_t key_token,
                  float *scores) {
  if (queries < MANY_QUERIES || dim > MAX_DIM) {
    osaurus_product(queries, keys, dim, query, dim, key, key_token, scores, KEY_BLOCK);
    return;
  }
  float transposed[MAX_DIM * KEY_BLOCK];
  const int padded = (keys + LANES - 1) / LANES * LANES;
  transpose(keys, dim, key, key_token, transposed, KEY_BLOCK);
  for (int m = 0; m < queries; m++)
    for (int n = 0; n < padded; n += LANES) _mm256_storeu_ps(scores + m * KEY_BLOCK + n, _mm256_setzero_ps());
  add_product(queries, padded, dim, query, dim, transposed, KEY_BLOCK, scores, KEY_BLOCK);
}

/* The state of a query's softmax over the keys so far. */
struct progress {
  float highest; /* Its highest score, unscaled. */
  float sum;     /* Of its weights, relative to that; not a number once a score was none, or infinite. */
};

/* Make weights of a query's scores of one block, in place, and scale what was summed before to them.
 *
 * The scores are followed by room up to a whole vector; keys from `seen` on, and those the mask hides, get
 * the weight 0.
 */
static void weigh(float *scores, int seen, const uint8_t *mask, float scale, struct progress *before, float *out,
                  int value_dim) {
  const int padded = (seen + LANES - 1) / LANES * LANES;
  for (int key = seen; key < padded; key++) scores[key] = -INFINITY;
  __m256 high = _mm256_set1_ps(-INFINITY), is_none = _mm256_setzero_ps();
  for (int key = 0; key < padded; key += LANES) {
    __m256 score = _mm256_loadu_ps(scores + key);
    if (mask) {
      uint8_t bytes[LANES] = {0};
      for (int i = 0; i < LANES && key + i < seen; i++) bytes[i] = mask[key + i];
      const __m256i seen_lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
      const __m256i is_hidden = _mm256_cmpeq_epi32(seen_lanes, _mm256_setzero_si256());
      score = _mm256_blendv_ps(score, _mm256_set1_ps(-INFINITY), _mm256_castsi256_ps(is_hidden));
      _mm256_storeu_ps(scores + key, score);
    }
    is_none = _mm256_or_ps(is_none, _mm256_cmp_ps(score, score, _CMP_UNORD_Q));
    high = _mm256_max_ps(high, score);
  }
  const float highest = fmaxf(before->highest, largest(high));
  const int is_broken = _mm256_movemask_ps(is_none) || highest == INFINITY;
  if (is_broken) before->sum = NAN; /* A broken model must not seem to be a sound one. */
  if (is_broken || highest == -INFINITY) { /* or it sees nothing yet */
    for (int key = 0; key < KEY_BLOCK; key++) scores[key] = 0.0f;
    return;
  }
  if (highest > before->highest) {
    const float factor = exponential((before->highest - highest) * scale);
    before->highest = highest;
    before->sum *= factor;
    for (int n = 0; n < value_dim; n += LANES)
      _mm256_storeu_ps(out + n, _mm256_mul_ps(_mm256_loadu_ps(out + n), _mm256_set1_ps(factor)));
  }
  __m256 sum = _mm256_setzero_ps();
  int key = 0;
  for (; key < padded; key += LANES) {
    const __m256 distance = _mm256_sub_ps(_mm256_loadu_ps(scores + key), _mm256_set1_ps(highest));
    const __m256 weight = exponentials(_mm256_mul_ps(distance, _mm256_set1_ps(scale)));
    sum = _mm256_add_ps(sum, weight);
    _mm256_storeu_ps(scores + key, weight);
  }
  before->sum += total(sum);
  for (; key < KEY_BLOCK; key++) scores[key] = 0.0f;
}

/* The keys that a query sees at most, when the mask's end is looked at. */
static int last_seen(const struct attention *a, int row, int query) {
  int end = a->is_causal ? a->key_count - a->query_count + query + 1 : a->key_count;
  if (a->mask) {
    const uint8_t *mask = a->mask + row * a->mask_row + query * a->mask_query;
    while (end > 0 && !mask[end - 1]) end--;
  }
  return end > 0 ? end : 0;
}

/* Some queries of heads that share their keys; they lie beside each other. */
static void attend(const struct attention *a, int row, int kv_head, int first, int count) {
  float scores[QUERY_BLOCK * KEY_BLOCK], sums[QUERY_BLOCK * MAX_DIM];
  struct progress progress[QUERY_BLOCK];
  int seen[QUERY_BLOCK], end = 0;
  const int shared = a->heads / a->kv_heads * a->query_count;
  const size_t place = ((size_t)row * a->kv_heads + kv_head) * shared + first;
  const float *keys = a->keys + row * a->key_row + kv_head * a->key_head;
  const float *values = a->values + row * a->value_row + kv_head * a->value_head;
  memset(sums, 0, (size_t)count * a->value_dim * sizeof(float));
  for (int i = 0; i < count; i++) {
    progress[i] = (struct progress){-INFINITY, 0.0f};
    seen[i] = last_seen(a, row, (first + i) % a->query_count);
    end = seen[i] > end ? seen[i] : end;
  }
  for (int from = 0; from < end; from += KEY_BLOCK) {
    const int width = end - from < KEY_BLOCK ? end - from : KEY_BLOCK;
    score(count, width, a->dim, a->queries + place * a->dim, keys + from * a->key_token, a->key_token, scores);
    for (int i = 0; i < count; i++) {
      const int own = seen[i] - from < 0 ? 0 : seen[i] - from < width ? seen[i] - from : width;
      const uint8_t *mask =
          a->mask ? a->mask + row * a->mask_row + (first + i) % a->query_count * a->mask_query + from : NULL;
      weigh(scores + i * KEY_BLOCK, own, mask, a->scale, progress + i, sums + i * a->value_dim, a->value_dim);
    }
    add_product(count, a->value_dim, width, scores, KEY_BLOCK, values + from * a->value_token, a->value_token,
                sums, a->value_dim);
  }
  for (int i = 0; i < count; i++) {
    const __m256 share = _mm256_set1_ps(progress[i].sum == 0.0f ? 0.0f : 1.0f / progress[i].sum);
    for (int n = 0; n < a->value_dim; n += LANES)
      _mm256_storeu_ps(a->out + (place + i) * a->value_dim + n,
                       _mm256_mul_ps(_mm256_loadu_ps(sums + i * a->value_dim + n), share));
  }
}

/* Few queries of several heads make one block; of many, a block has those of one head, which see alike. */
static int run_length(const struct attention *a) {
  const int shared = a->heads / a->kv_heads * a->query_count;
  return a->query_count < QUERY_BLOCK / 2 ? shared : a->query_count;
}

static int blocks_of_run(const struct attention *a) { return (run_length(a) + QUERY_BLOCK - 1) / QUERY_BLOCK; }

static void attend_piece(const void *of, int piece) {
  const struct attention *a = of;
  const int run = run_length(a), blocks = blocks_of_run(a);
  const int runs = a->heads / a->kv_heads * a->query_count / run;
  const int first = piece % blocks * QUERY_BLOCK, start = piece / blocks % runs * run;
  const int pair = piece / blocks / runs;
  attend(a, pair / a->kv_heads, pair % a->kv_heads, start + first,
         run - first < QUERY_BLOCK ? run - first : QUERY_BLOCK);
}

/* Scaled dot-product attention; heads / kv_heads neighbouring heads share keys and values. A query that sees
 * nothing gives zeros. Returns 0 where the sizes are none that this does. */
int osaurus_attention(const struct attention *a) {
  if (a->value_dim % LANES || a->value_dim > MAX_DIM || a->kv_heads < 1 || a->heads % a->kv_heads) return 0;
  const int runs = a->heads / a->kv_heads * a->query_count / run_length(a);
  const int pieces = a->rows * a->kv_heads * runs * blocks_of_run(a);
  const double work = (double)a->rows * a->heads * a->query_count * a->key_count * a->dim;
  if (work >= LEAST_DIVIDED)
    osaurus_divide(attend_piece, a, pieces);
  else
    for (int piece = 0; piece < pieces; piece++) attend_piece(a, piece);
  return 1;
}

/* out = gate * sigmoid(gate) * x, elementwise. */
void osaurus_swiglu(size_t count, const float *gate, const float *x, float *out) {
  const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    const __m256 divisor = _mm256_add_ps(one, exponentials(_mm256_xor_ps(g, sign)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_div_ps(g, divisor), _mm256_loadu_ps(x + i)));
  }
  for (; i < count; i++) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * x[i];
}
