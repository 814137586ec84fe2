// For kernels that define LANES and vec, a vector of so many floats.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Transpose LANES × LANES numbers: blocks of `step` change places, from the largest to single ones.
static inline void transpose(vec *rows) {
#pragma GCC unroll 4
  for (int step = LANES / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & step) continue;
      vec upper = rows[i], lower = rows[i + step];
#ifdef __AVX512F__
      typedef int index __attribute__((vector_size(sizeof(vec))));
      const index lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const index left = lane + (lane & step) / step * (LANES - step), right = left + step;
      rows[i] = (vec)_mm512_permutex2var_ps((__m512)upper, (__m512i)left, (__m512)lower);
      rows[i + step] = (vec)_mm512_permutex2var_ps((__m512)upper, (__m512i)right, (__m512)lower);
#else
      for (int lane = 0; lane < LANES; lane++) {
        rows[i][lane] = lane & step ? lower[lane - step] : upper[lane];
        rows[i + step][lane] = lane & step ? lower[lane] : upper[lane + step];
      }
#endif
    }
}
