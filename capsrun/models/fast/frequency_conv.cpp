// A strided convolution and its gradients through discrete Fourier transforms, on a CPU.
//
// With stride S the rows and columns of maps and kernel, taken modulo S, are S² phases, and the
// convolution is a sum over phases of convolutions with stride 1, of at most T taps an axis. On a
// circle of N = G + T - 1 samples an axis these give the G outputs exactly. There a convolution is a
// product of spectra: for each of F frequencies a complex matrix product over channels and phases.
//
// Sizes: B images of px × px pixels, C channels of the maps, O of the outputs; N and T are given to the
// compiler. Real samples have conjugate-symmetric spectra, so half of the frequencies are kept:
// (N² + 4) / 2 of them for an even N, (N² + 1) / 2 for an odd one.
//
// Spectra lie in matrices [F][row blocks][column blocks][L rows][L columns] of complex numbers (see
// Matrix), with L = LANES. L complex numbers are a line: in float32 L real parts and L imaginary ones,
// in bfloat16 L pairs, which is what the instructions for bfloat16 multiply. A tile of L lines is a
// matrix of L × 2L real numbers on the left of a product and of 2L × L on its right, and a complex
// product (a + bi)(c + di) is two real ones: of (a, -b) and of (b, a) with (c, d).
//
// Sums are in float32. No sum depends on the number of threads, nor an image's on other images.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__linux__) && \
    !defined(NO_AMX)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define UNROLLED _Pragma("GCC unroll 32")

enum { LINE = 2 * LANES, TILE = LANES * LINE };
enum { G = N - T + 1, HALF = N / 2, ODD = (N - 1) / 2, F = N % 2 ? (N * N + 1) / 2 : (N * N + 4) / 2 };

typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES)));
struct bf16 {
  uint16_t value;
};

// ---- Numbers in memory ----

static inline vec load(const bf16 *from) {
  half_bits half;
  memcpy(&half, from, sizeof half);
  return (vec)(__builtin_convertvector(half, bits) << 16);
}

// The nearest bfloat16, in the lower half of each number; NaN stays NaN.
static inline bits rounded(vec x) {
#ifdef __AVX512BF16__
  return (bits)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  bits exact = (bits)x;
  bits nearest = (exact + 0x7fff + ((exact >> 16) & 1)) >> 16;
  return x == x ? nearest : (exact >> 16 | 64);
#endif
}

static inline void store(vec x, float *to) { memcpy(to, &x, sizeof x); }

static inline void store(vec x, bf16 *to) {
  half_bits half = __builtin_convertvector(rounded(x), half_bits);
  memcpy(to, &half, sizeof half);
}

// The last channels may be fewer than a vector holds.
template <class E> static inline vec load(const E *from, int count) {
  if (count >= LANES) return load(from);
  E some[LANES] = {};
  memcpy(some, from, count * sizeof(E));
  return load(some);
}

template <class E> static inline void store(vec x, E *to, int count) {
  if (count >= LANES) return store(x, to);
  E some[LANES];
  store(x, some);
  memcpy(to, some, count * sizeof(E));
}

// Write an aligned vector past the caches: what is written whole need not be read first, and large
// matrices would not stay there in any case. Three to eight times as fast for spectra. Other threads
// see it after the barrier of libgomp, whose locked instructions wait for such writes too.
static inline void stream(vec x, void *to) {
#ifdef __AVX512F__
  _mm512_stream_ps((float *)to, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps((float *)to, (__m256)x);
#else
  memcpy(to, &x, sizeof x);
#endif
}

static inline void stream_line(vec re, vec im, float *to) {
  stream(re, to);
  stream(im, to + LANES);
}

static inline void stream_line(vec re, vec im, bf16 *to) {
  stream((vec)(rounded(re) | rounded(im) << 16), to);
}

static inline void load_line(const float *from, vec &re, vec &im) {
  re = load(from);
  im = load(from + LANES);
}

static inline void load_line(const bf16 *from, vec &re, vec &im) {
  bits pairs;
  memcpy(&pairs, from, sizeof pairs);
  re = (vec)(pairs << 16);
  im = (vec)(pairs & 0xffff0000u);
}

static inline int blocks(int count) { return (count + LANES - 1) / LANES; }

// How a matrix lies in memory, in numbers. One unused tile a row block and one line a frequency keep
// steps from being powers of two, whose addresses would share a few lines of the caches.
struct Matrix {
  size_t row_step, frequency_step;
  Matrix(int row_blocks, int column_blocks)
      : row_step((size_t)(column_blocks + 1) * TILE), frequency_step(row_blocks * row_step + 2 * LINE) {}
  size_t line(int row, int column_block) const {
    return row / LANES * row_step + (size_t)column_block * TILE + row % LANES * LINE;
  }
};

extern "C" size_t matrix_size(int row_blocks, int column_blocks) {
  return F * Matrix(row_blocks, column_blocks).frequency_step;
}

// Brings what is read next into the cache, a few lines in each turn of the loop before: `chunk` bytes
// at each `step`.
struct Ahead {
  const char *at;
  size_t chunk, step, done;
  inline void fetch(int cache_lines) {
    for (int i = 0; i < cache_lines; i++) {
      __builtin_prefetch(at + done, 0, 2);
      done += 64;
      if (done == chunk) at += step, done = 0;
    }
  }
};

// ---- Transforms of N samples an axis, LANES channels at a time ----

static float COS[N][N], SIN[N][N];
// What a frequency counts for in the inverse transform: those whose conjugates are left out twice.
static float WEIGHT[F];

__attribute__((constructor)) static void fill_tables() {
  for (int k = 0; k < N; k++)
    for (int n = 0; n < N; n++) {
      COS[k][n] = cos(2 * M_PI * (k * n % N) / N);
      SIN[k][n] = sin(2 * M_PI * (k * n % N) / N);
    }
  for (int k = 0, f = 0; k <= HALF; k++) {
    bool real = k == 0 || 2 * k == N;
    for (int l = 0; l < (real ? HALF + 1 : N); l++, f++)
      WEIGHT[f] = (real && (l == 0 || 2 * l == N) ? 1.0 : 2.0) / (N * N);
  }
}

// x[0 … COUNT-1], and zeros up to N, to re[0 … HALF] and im[1 … ODD].
template <int COUNT> static inline void real_dft(const vec *x, vec *re, vec *im) {
  vec even[ODD + 1], odd[ODD + 1];
  UNROLLED for (int n = 1; n <= ODD; n++) {
    if (n >= COUNT) continue;
    even[n] = odd[n] = x[n];
    if (N - n < COUNT) {
      even[n] += x[N - n];
      odd[n] -= x[N - n];
    }
  }
  for (int k = 0; k <= HALF; k++) {
    vec sum = x[0];
    UNROLLED for (int n = 1; n <= ODD; n++) if (n < COUNT) sum += even[n] * COS[k][n];
    if (N % 2 == 0 && HALF < COUNT) sum += x[HALF] * COS[k][HALF];
    re[k] = sum;
  }
  for (int k = 1; k <= ODD; k++) {
    vec sum = {};
    UNROLLED for (int n = 1; n <= ODD; n++) if (n < COUNT) sum -= odd[n] * SIN[k][n];
    im[k] = sum;
  }
}

// The transposed linear map of `real_dft`.
template <int COUNT> static inline void real_dft_transposed(const vec *re, const vec *im, vec *x) {
  for (int n = 0; n <= HALF && n < COUNT; n++) {
    vec even = re[0], odd = {};
    UNROLLED for (int k = 1; k <= HALF; k++) even += re[k] * COS[k][n];
    UNROLLED for (int k = 1; k <= ODD; k++) odd += im[k] * SIN[k][n];
    x[n] = even - odd;
    if (n > 0 && 2 * n < N && N - n < COUNT) x[N - n] = even + odd;
  }
}

// Along the other axis. rows[k] holds the real parts of the rows' spectra, rows[HALF + k] their
// imaginary parts, which are none where the column's transform is real too.
template <int COUNT> static inline void column_dft(const vec (*rows)[COUNT], vec *re, vec *im) {
  for (int k = 0; k <= HALF; k++) {
    vec a_re[HALF + 1], a_im[HALF + 1] = {}, b_re[HALF + 1], b_im[HALF + 1];
    real_dft<COUNT>(rows[k], a_re, a_im);
    if (k == 0 || 2 * k == N) {
      for (int l = 0; l <= HALF; l++) {
        *re++ = a_re[l];
        *im++ = l == 0 || 2 * l == N ? (vec){} : a_im[l];
      }
      continue;
    }
    real_dft<COUNT>(rows[HALF + k], b_re, b_im);
    for (int l = 0; l <= HALF; l++) {
      re[l] = a_re[l];
      im[l] = b_re[l];
      if (l == 0 || 2 * l == N) continue;
      re[l] -= b_im[l];
      im[l] += a_im[l];
      re[N - l] = a_re[l] + b_im[l];
      im[N - l] = b_re[l] - a_im[l];
    }
    re += N;
    im += N;
  }
}

template <int COUNT>
static inline void column_dft_transposed(const vec *re, const vec *im, vec (*rows)[COUNT]) {
  for (int k = 0; k <= HALF; k++) {
    if (k == 0 || 2 * k == N) {
      real_dft_transposed<COUNT>(re, im, rows[k]);
      re += HALF + 1;
      im += HALF + 1;
      continue;
    }
    vec a_re[HALF + 1], a_im[HALF + 1], b_re[HALF + 1], b_im[HALF + 1];
    for (int l = 0; l <= HALF; l++) {
      a_re[l] = re[l];
      b_re[l] = im[l];
      if (l == 0 || 2 * l == N) continue;
      a_re[l] += re[N - l];
      b_re[l] += im[N - l];
      a_im[l] = im[l] - im[N - l];
      b_im[l] = re[N - l] - re[l];
    }
    real_dft_transposed<COUNT>(a_re, a_im, rows[k]);
    real_dft_transposed<COUNT>(b_re, b_im, rows[HALF + k]);
    re += N;
    im += N;
  }
}

// The spectrum of COUNT × COUNT samples, zeros beyond them; sample(y, x) gives one.
template <int COUNT, class Sample> static inline void dft(Sample sample, vec *re, vec *im) {
  vec rows[N][COUNT];
  for (int y = 0; y < COUNT; y++) {
    vec samples[COUNT], row_re[HALF + 1], row_im[HALF + 1];
    for (int x = 0; x < COUNT; x++) samples[x] = sample(y, x);
    real_dft<COUNT>(samples, row_re, row_im);
    for (int k = 0; k <= HALF; k++) rows[k][y] = row_re[k];
    for (int k = 1; k <= ODD; k++) rows[HALF + k][y] = row_im[k];
  }
  column_dft<COUNT>(rows, re, im);
}

// The transposed linear map; put(y, x, value) takes a sample.
template <int COUNT, class Put>
static inline void dft_transposed(const vec *re, const vec *im, Put put) {
  vec rows[N][COUNT];
  column_dft_transposed<COUNT>(re, im, rows);
  for (int y = 0; y < COUNT; y++) {
    vec samples[COUNT], row_re[HALF + 1], row_im[HALF + 1];
    for (int k = 0; k <= HALF; k++) row_re[k] = rows[k][y];
    for (int k = 1; k <= ODD; k++) row_im[k] = rows[HALF + k][y];
    real_dft_transposed<COUNT>(row_re, row_im, samples);
    for (int x = 0; x < COUNT; x++) put(y, x, samples[x]);
  }
}

// ---- Between maps (or kernels, whose "images" are the output channels) and spectra ----

struct Maps {  // [B][px][px][C]
  int images, px, channels, stride;
  size_t task(int image, int block, int phase) const {
    return ((size_t)image * blocks(channels) + block) * stride * stride + phase;
  }
  size_t at(int image, int row, int column, int block) const {
    return (((size_t)image * px + row) * px + column) * channels + block * LANES;
  }
};

// Bit by bit which of a vector's numbers pass a ReLU, as NaN does, and these of a vector.
static inline uint16_t positive(vec x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NLE_UQ));
#else
  uint16_t mask = 0;
  for (int lane = 0; lane < LANES; lane++) mask |= !(x[lane] <= 0.0f) << lane;
  return mask;
#endif
}

static inline vec select(uint16_t mask, vec x) {
#ifdef __AVX512F__
  return (vec)_mm512_maskz_mov_ps(mask, (__m512)x);
#else
  bits lane;
  for (int i = 0; i < LANES; i++) lane[i] = 1u << i;
  return (lane & mask) != 0 ? x : (vec){};
#endif
}

// maps to spectra [B] × [phases · C]. masks: null, or ReLU is applied to the maps and what passes it
// is kept here, [B][C blocks][phases][COUNT][COUNT].
template <int COUNT, class In, class Out>
static void analyse(const In *maps, Maps m, uint16_t *masks, int threads, Out *spectra) {
  const int S = m.stride, per_phase = blocks(m.channels);
  const Matrix matrix(blocks(m.images), S * S * per_phase);
  const size_t image_bytes = m.at(1, 0, 0, 0) * sizeof(In);
  const int cache_lines = image_bytes / 64 / (per_phase * S * S * COUNT) + 1;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int image = 0; image < blocks(m.images) * LANES; image++)
    for (int block = 0; block < per_phase; block++)
      for (int phase = 0; phase < S * S; phase++) {
        vec re[F], im[F];
        size_t part = ((size_t)block * S * S + phase) * COUNT * cache_lines * 64;
        uint16_t *mask = masks ? masks + m.task(image, block, phase) * COUNT * COUNT : 0;
        Ahead ahead = {(const char *)maps + (image + 1) * image_bytes + part, image_bytes, 0, 0};
        dft<COUNT>(
            [&](int y, int x) {
              if (x == 0) ahead.fetch(cache_lines);
              int row = y * S + phase / S, column = x * S + phase % S;
              if (image >= m.images || row >= m.px || column >= m.px) return (vec){};
              vec sample = load(maps + m.at(image, row, column, block), m.channels - block * LANES);
              return mask ? select(mask[y * COUNT + x] = positive(sample), sample) : sample;
            },
            re, im);
        Out *to = spectra + matrix.line(image, phase * per_phase + block);
        for (int f = 0; f < F; f++) stream_line(re[f], im[f], to + f * matrix.frequency_step);
      }
}

// Two halves of a vector of bfloat16, or two vectors of float32, past the caches; see `stream`.
static inline void stream_pair(vec first, vec second, bf16 *to) {
  half_bits both[2] = {__builtin_convertvector(rounded(first), half_bits),
                       __builtin_convertvector(rounded(second), half_bits)};
  vec line;
  memcpy(&line, both, sizeof line);
  stream(line, to);
}

static inline void stream_pair(vec first, vec second, float *to) {
  stream(first, to);
  stream(second, to + LANES);
}

// Gradients of spectra to gradients of maps; masks: what `analyse` kept.
template <int COUNT, class In, class Out>
static void analyse_backward(const In *spectra, Maps m, const uint16_t *masks, int threads,
                             Out *maps) {
  const int S = m.stride, per_phase = blocks(m.channels), pairs = (per_phase + 1) / 2;
  const Matrix matrix(blocks(m.images), S * S * per_phase);
  const bool whole_lines = m.channels % (2 * LANES) == 0;
#pragma omp parallel for collapse(3) num_threads(threads) schedule(static)
  for (int group = 0; group < blocks(m.images); group++)
    for (int pair = 0; pair < pairs; pair++)
      for (int phase = 0; phase < S * S; phase++) {
        static thread_local In lines[2][LANES][F][LINE];
        const int count = per_phase - 2 * pair < 2 ? 1 : 2;
        const In *from = spectra + matrix.line(group * LANES, phase * per_phase + 2 * pair);
        for (int f = 0; f < F; f++)
          for (int half = 0; half < count; half++)
            for (int i = 0; i < LANES; i++)
              memcpy(lines[half][i][f], from + f * matrix.frequency_step + half * TILE + i * LINE,
                     sizeof(In) * LINE);
        for (int i = 0; i < LANES && group * LANES + i < m.images; i++) {
          int image = group * LANES + i;
          vec re[F], im[F], first_half[COUNT][COUNT];
          for (int half = 0; half < count; half++) {
            int block = 2 * pair + half;
            const uint16_t *mask = masks ? masks + m.task(image, block, phase) * COUNT * COUNT : 0;
            for (int f = 0; f < F; f++) load_line(lines[half][i][f], re[f], im[f]);
            dft_transposed<COUNT>(re, im, [&](int y, int x, vec value) {
              int row = y * S + phase / S, column = x * S + phase % S;
              if (row >= m.px || column >= m.px) return;
              size_t at = m.at(image, row, column, block);
              if (mask) value = select(mask[y * COUNT + x], value);
              if (!whole_lines) store(value, maps + at, m.channels - block * LANES);
              else if (half == 0) first_half[y][x] = value;
              else stream_pair(first_half[y][x], value, maps + at - LANES);
            });
          }
        }
      }
}

// Spectra [B] × [O] to outputs [B][G][G][O].
static void synthesise(const float *spectra, int B, int O, int threads, float *outputs) {
  const Matrix matrix(blocks(B), blocks(O));
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int image = 0; image < B; image++)
    for (int block = 0; block < blocks(O); block++) {
      vec re[F], im[F];
      for (int f = 0; f < F; f++) {
        load_line(spectra + f * matrix.frequency_step + matrix.line(image, block), re[f], im[f]);
        re[f] *= WEIGHT[f];
        im[f] *= WEIGHT[f];
      }
      dft_transposed<G>(re, im, [&](int y, int x, vec value) {
        float *to = outputs + (((size_t)image * G + y) * G + x) * O + block * LANES;
        store(value, to, O - block * LANES);
      });
    }
}

// Gradients of outputs [B][G][G][O] to those of their spectra, as left factors of products, so with
// both tiles of each: g as [B] × [O], and conj(g) as [O] × [B].
template <class E>
static void synthesise_backward(const float *outputs, int B, int O, int threads, E *g, E *g_adjoint) {
  const Matrix matrix(blocks(B), 2 * blocks(O)), adjoint(blocks(O), 2 * blocks(B));
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int group = 0; group < blocks(B); group++)
    for (int block = 0; block < blocks(O); block++) {
      static thread_local vec re[LANES][F], im[LANES][F];
      for (int i = 0; i < LANES; i++) {
        int image = group * LANES + i;
        dft<G>(
            [&](int y, int x) {
              if (image >= B) return (vec){};
              size_t at = (((size_t)image * G + y) * G + x) * O + block * LANES;
              return load(outputs + at, O - block * LANES);
            },
            re[i], im[i]);
      }
      for (int f = 0; f < F; f++) {
        E *to = g + f * matrix.frequency_step + matrix.line(group * LANES, 2 * block);
        E *to_adjoint = g_adjoint + f * adjoint.frequency_step + adjoint.line(block * LANES, 2 * group);
        vec a[LANES], b[LANES];
        for (int i = 0; i < LANES; i++) {
          a[i] = re[i][f] * WEIGHT[f];
          b[i] = im[i][f] * WEIGHT[f];
          stream_line(a[i], -b[i], to + i * LINE);
          stream_line(b[i], a[i], to + TILE + i * LINE);
        }
        transpose(a);
        transpose(b);
        for (int i = 0; i < LANES; i++) {
          stream_line(a[i], b[i], to_adjoint + i * LINE);
          stream_line(-b[i], a[i], to_adjoint + TILE + i * LINE);
        }
      }
    }
}

// ---- Matrix products ----

// Left and right factors: two rows (columns) of K tiles, `step` apart.
template <class E> struct Factor {
  const E *first, *second;
  size_t step;
};

#ifdef AMX
struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64)));

// The tile registers for a scope, given back as they were found: other libraries use them too.
struct TileRegisters {
  TileConfig found;
  TileRegisters() {
    TileConfig ours = {};
    ours.palette = 1;
    for (int tile = 0; tile < 8; tile++) ours.row_bytes[tile] = 2 * LINE, ours.rows[tile] = LANES;
    _tile_storeconfig(&found);
    _tile_loadconfig(&ours);
  }
  ~TileRegisters() { _tile_loadconfig(&found); }
};

// products[i][j] = sum over k of left i times right j, LANES × LANES real numbers each.
static inline void multiply(Factor<bf16> left, Factor<bf16> right, int K, Ahead &ahead,
                            int cache_lines, float products[2][2][LANES * LANES]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < K; k++) {
    _tile_loadd(4, left.first + k * left.step, 2 * LINE);
    _tile_loadd(6, right.first + k * right.step, 2 * LINE);
    _tile_loadd(5, left.second + k * left.step, 2 * LINE);
    _tile_loadd(7, right.second + k * right.step, 2 * LINE);
    ahead.fetch(cache_lines);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, products[0][0], 64);
  _tile_stored(1, products[0][1], 64);
  _tile_stored(2, products[1][0], 64);
  _tile_stored(3, products[1][1], 64);
}
#else
struct TileRegisters {
  TileRegisters() {}
};
#endif

#ifdef __AVX512F__
enum { TOGETHER = 8 };  // rows whose sums are in registers
#else
enum { TOGETHER = 4 };
#endif

// What the k-th column of a row on the left and the k-th row on the right add to their product.
static inline vec multiply_add(vec sum, const float *left, const float *right, int k) {
  return sum + left[k] * load(right + k % LANES * LINE + k / LANES * LANES);
}

static inline vec multiply_add(vec sum, const bf16 *left, const bf16 *right, int k) {
  uint32_t pair;
  bits pairs;
  memcpy(&pair, left + 2 * k, sizeof pair);
  memcpy(&pairs, right + k * LINE, sizeof pairs);
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
#else
  bits both = pair - (bits){};
  sum += (vec)(both << 16) * (vec)(pairs << 16);
  return sum + (vec)(both & 0xffff0000u) * (vec)(pairs & 0xffff0000u);
#endif
}

template <class E>
static inline void multiply(Factor<E> left, Factor<E> right, int K, Ahead &ahead, int cache_lines,
                            float products[2][2][LANES * LANES]) {
  // So many tiles on the right, which each group of rows needs again, stay in the L1 cache.
  enum { DEPTH = LINE * sizeof(E) / 4, CHUNK = 16384 / (2 * TILE * sizeof(E)) };
  enum { GROUPS = 2 * LANES / TOGETHER };
  for (int start = 0; start < K; start += CHUNK)
    for (int i = 0; i < 2; i++)
      for (int row = 0; row < LANES; row += TOGETHER) {
        vec first[TOGETHER] = {}, second[TOGETHER] = {};
        float *sums = products[i][0] + row * LANES, *more = products[i][1] + row * LANES;
        for (int r = 0; r < TOGETHER && start; r++) {
          first[r] = load(sums + r * LANES);
          second[r] = load(more + r * LANES);
        }
        const E *rows = (i ? left.second : left.first) + row * LINE;
        for (int k = start; k < start + CHUNK && k < K; k++) {
          ahead.fetch((cache_lines + GROUPS - 1) / GROUPS);
          const E *a = rows + k * left.step;
          for (int l = 0; l < DEPTH; l++)
            UNROLLED for (int r = 0; r < TOGETHER; r++) {
              first[r] = multiply_add(first[r], a + r * LINE, right.first + k * right.step, l);
              second[r] = multiply_add(second[r], a + r * LINE, right.second + k * right.step, l);
            }
        }
        for (int r = 0; r < TOGETHER; r++) {
          store(first[r], sums + r * LANES);
          store(second[r], more + r * LANES);
        }
      }
}

template <class E> static inline void stream_tile(const float *re, const float *im, E *to) {
  for (int row = 0; row < LANES; row++)
    stream_line(load(re + row * LANES), load(im + row * LANES), to + row * LINE);
}

// A tile w to the two right factors of a product with its adjoint.
static inline void adjoint_tiles(const bf16 *w, bf16 *tiles) {
  vec rows[LANES];
  memcpy(rows, w, sizeof rows);
  transpose(rows);
  for (int row = 0; row < LANES; row++) {
    bits pairs = (bits)rows[row], turned = (pairs >> 16 | pairs << 16) ^ 0x8000u;  // by i
    memcpy(tiles + row * LINE, &pairs, sizeof pairs);
    memcpy(tiles + TILE + row * LINE, &turned, sizeof turned);
  }
}

static inline void adjoint_tiles(const float *w, float *tiles) {
  vec re[LANES], im[LANES];
  for (int row = 0; row < LANES; row++) load_line(w + row * LINE, re[row], im[row]);
  transpose(re);
  transpose(im);
  for (int row = 0; row < LANES; row++, tiles += LINE) {
    store(re[row], tiles);
    store(im[row], tiles + LANES);
    store(-im[row], tiles + TILE);
    store(re[row], tiles + TILE + LANES);
  }
}

// y [B] × [O] = x [B] × [K] times the adjoint of w [O] × [K], for each frequency; K in blocks.
template <class E>
static void multiply_adjoint(const E *x, const E *w, int B, int O, int K, int threads, float *y) {
  const Matrix xs(blocks(B), K), ws(blocks(O), K), ys(blocks(B), blocks(O));
  const int pairs = (blocks(B) + 1) / 2;
#pragma omp parallel num_threads(threads)
  {
    E *panel = (E *)aligned_alloc(64, sizeof(E) * 2 * TILE * K);
    float products[2][2][LANES * LANES] __attribute__((aligned(64)));
#pragma omp for collapse(2) schedule(static)
    for (int f = 0; f < F; f++)
      for (int block = 0; block < blocks(O); block++) {
        TileRegisters registers;
        const E *from = w + f * ws.frequency_step + block * ws.row_step;
        for (int k = 0; k < K; k++) adjoint_tiles(from + (size_t)k * TILE, panel + (size_t)k * 2 * TILE);
        Factor<E> right = {panel, panel + TILE, 2 * TILE};
        bool last_block = block + 1 == blocks(O);
        const E *next = last_block ? w + (f + 1) * ws.frequency_step : from + ws.row_step;
        Ahead ahead = {(const char *)next, sizeof(E) * TILE * K, 0, 0};
        int cache_lines = (sizeof(E) * TILE / 64 + pairs - 1) / pairs;
        for (int pair = 0; pair < pairs; pair++) {
          const E *rows = x + f * xs.frequency_step + 2 * pair * xs.row_step;
          int count = blocks(B) - 2 * pair < 2 ? 1 : 2;
          Factor<E> left = {rows, rows + (count - 1) * xs.row_step, TILE};
          multiply(left, right, K, ahead, cache_lines, products);
          float *to = y + f * ys.frequency_step + 2 * pair * ys.row_step + (size_t)block * TILE;
          for (int i = 0; i < count; i++)
            stream_tile(products[i][0], products[i][1], to + i * ys.row_step);
        }
      }
    free(panel);
  }
}

// c [rows] × [columns] = a [rows] × [K] times b [K] × [columns], for each frequency, all in blocks;
// a with both tiles of each.
template <class E>
static void multiply(const E *a, const E *b, int rows, int K, int columns, int threads, E *c) {
  const Matrix as(rows, 2 * K), bs(K, columns), cs(rows, columns);
  const int pairs = (columns + 1) / 2;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int f = 0; f < F; f++)
    for (int pair = 0; pair < pairs; pair++) {
      TileRegisters registers;
      float products[2][2][LANES * LANES] __attribute__((aligned(64)));
      const int count = columns - 2 * pair < 2 ? 1 : 2;
      const E *from = b + f * bs.frequency_step + (size_t)pair * 2 * TILE;
      Factor<E> right = {from, from + (count - 1) * TILE, bs.row_step};
      const E *next = pair + 1 == pairs ? b + (f + 1) * bs.frequency_step : from + 2 * TILE;
      Ahead ahead = {(const char *)next, sizeof(E) * 2 * TILE, sizeof(E) * bs.row_step, 0};
      int cache_lines = (sizeof(E) * 2 * TILE / 64 + rows - 1) / rows;
      for (int row = 0; row < rows; row++) {
        const E *mine = a + f * as.frequency_step + row * as.row_step;
        multiply(Factor<E>{mine, mine + TILE, 2 * TILE}, right, K, ahead, cache_lines, products);
        E *to = c + f * cs.frequency_step + row * cs.row_step + (size_t)pair * 2 * TILE;
        for (int j = 0; j < count; j++)
          stream_tile(products[0][j], products[1][j], to + j * TILE);
      }
    }
}

// ---- What Python calls; C, K and O as above, pixels of maps in E, kernels and outputs in float32 ----

extern "C" int lanes() { return LANES; }

extern "C" int ready() {
#ifdef AMX
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ask Linux for the tile registers
#else
  return 1;
#endif
}

template <class E>
static void forward(const E *maps, const float *kernel, int B, int px, int C, int O, int size,
                    int S, int with_kernel, int threads, uint16_t *masks, E *x, E *w, float *y,
                    float *outputs) {
  analyse<N>(maps, Maps{B, px, C, S}, masks, threads, x);
  if (with_kernel) analyse<T>(kernel, Maps{O, size, C, S}, 0, threads, w);
  if (!outputs) return;
  multiply_adjoint(x, w, B, O, S * S * blocks(C), threads, y);
  synthesise(y, B, O, threads, outputs);
}

template <class E>
static void backward(const float *outputs, const uint16_t *masks, int B, int px, int C, int O,
                     int size, int S, int threads, const E *x, const E *w, E *g, E *g_adjoint,
                     E *products, E *to_maps, float *to_kernel) {
  const int K = S * S * blocks(C);
  synthesise_backward(outputs, B, O, threads, g, g_adjoint);
  multiply(g, w, blocks(B), blocks(O), K, threads, products);
  analyse_backward<N>(products, Maps{B, px, C, S}, masks, threads, to_maps);
  multiply(g_adjoint, x, blocks(O), blocks(B), K, threads, products);
  analyse_backward<T>(products, Maps{O, size, C, S}, 0, threads, to_kernel);
}

#define EXPORT(SUFFIX, E)                                                                           \
  extern "C" void forward_##SUFFIX(const E *maps, const float *kernel, int B, int px, int C, int O, \
                                   int size, int S, int with_kernel, int threads, uint16_t *masks,  \
                                   E *x, E *w, float *y, float *outputs) {                          \
    forward(maps, kernel, B, px, C, O, size, S, with_kernel, threads, masks, x, w, y, outputs);     \
  }                                                                                                 \
  extern "C" void backward_##SUFFIX(const float *outputs, const uint16_t *masks, int B, int px,     \
                                    int C, int O, int size, int S, int threads, const E *x,         \
                                    const E *w, E *g, E *g_adjoint, E *products, E *to_maps,        \
                                    float *to_kernel) {                                             \
    backward(outputs, masks, B, px, C, O, size, S, threads, x, w, g, g_adjoint, products, to_maps,  \
             to_kernel);                                                                            \
  }
EXPORT(fp32, float)
EXPORT(bf16, bf16)
