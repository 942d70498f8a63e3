/* Eight numbers of a matrix as float32, however they are held. */
#ifndef OSAURUS_NUMBERS_H
#define OSAURUS_NUMBERS_H

#include <immintrin.h>

#include "kernels.h"

/* Whether numbers are held in groups that have a scale and a bias each. */
static inline __attribute__((always_inline)) int is_affine(const enum kind kind) {
  return kind == AFFINE4 || kind == AFFINE8 || kind == AFFINE8_ROUNDED;
}

/* The bytes before the element `at`. */
static inline __attribute__((always_inline)) size_t bytes_before(const enum kind kind, size_t at) {
  if (is_affine(kind)) return kind == AFFINE4 ? at / 2 : at;
  return kind == FLOAT32 ? 4 * at : 2 * at;
}

/* The elements from `at` on, which is a multiple of 8 where they are in groups; of one group, whose scale and
 * bias are given. */
static inline __attribute__((always_inline)) __m256 eight(const enum kind kind, const void *numbers, size_t at,
                                                          __m256 scale, __m256 bias) {
  const char *place = (const char *)numbers + bytes_before(kind, at);
  if (kind == FLOAT32) return _mm256_loadu_ps((const float *)place);
  if (kind == FLOAT16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)place));
  if (kind == BFLOAT16) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)place));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  __m256i codes;
  if (kind != AFFINE4) {
    codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)place));
  } else {
    /* Eight in a word, the first one lowest. */
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    codes = _mm256_srlv_epi32(_mm256_set1_epi32(*(const int32_t *)place), shifts);
    codes = _mm256_and_si256(codes, _mm256_set1_epi32(15));
  }
  const __m256 wide = _mm256_cvtepi32_ps(codes);
  if (kind == AFFINE8_ROUNDED) return _mm256_add_ps(_mm256_mul_ps(scale, wide), bias);
  return _mm256_fmadd_ps(scale, wide, bias);
}

/* One of them, which are in no groups. */
static inline __attribute__((always_inline)) float one(const enum kind kind, const void *numbers, size_t at) {
  if (kind == FLOAT32) return ((const float *)numbers)[at];
  const uint16_t narrow = ((const uint16_t *)numbers)[at];
  if (kind == FLOAT16) return _cvtsh_ss(narrow);
  const union {
    uint32_t bits;
    float number;
  } wide = {(uint32_t)narrow << 16};
  return wide.number;
}

#endif
