// Vectors as wide as the processor's registers, and what all kernels do with them.

#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *from) {
  vec x;
  memcpy(&x, from, sizeof x);
  return x;
}

// Transpose LANES × LANES numbers: blocks of `step` change places, from the largest to single ones.
static inline void transpose(vec *rows) {
#pragma GCC unroll 4
  for (int step = LANES / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & step) continue;
      vec upper = rows[i], lower = rows[i + step];
#if defined(__AVX512F__)
      typedef int index __attribute__((vector_size(sizeof(vec))));
      const index lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const index left = lane + (lane & step) / step * (LANES - step), right = left + step;
      rows[i] = (vec)_mm512_permutex2var_ps((__m512)upper, (__m512i)left, (__m512)lower);
      rows[i + step] = (vec)_mm512_permutex2var_ps((__m512)upper, (__m512i)right, (__m512)lower);
#elif defined(__AVX__)
      __m256 a = (__m256)upper, b = (__m256)lower;
      rows[i] = (vec)(step == 4   ? _mm256_permute2f128_ps(a, b, 0x20)
                      : step == 2 ? _mm256_shuffle_ps(a, b, 0x44)
                                  : _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xAA));
      rows[i + step] = (vec)(step == 4   ? _mm256_permute2f128_ps(a, b, 0x31)
                             : step == 2 ? _mm256_shuffle_ps(a, b, 0xEE)
                                         : _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xAA));
#else
      for (int lane = 0; lane < LANES; lane++) {
        rows[i][lane] = lane & step ? lower[lane - step] : upper[lane];
        rows[i + step][lane] = lane & step ? lower[lane] : upper[lane + step];
      }
#endif
    }
}
