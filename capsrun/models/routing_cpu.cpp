// Votes and routing by agreement on a CPU, forward and backward, in float32.
//
// Votes are never written to memory: wherever one is needed it is computed again from the weights,
// K multiplications that cost less than reading it would. Images are routed in groups of LANES, one
// image in each lane of a vector register, so that no sum over a capsule's dimensions crosses lanes.
//
// Sizes, as in routing.py: B batch, I input capsules, J output capsules, K input dimension,
// D output dimension; R iterations, G = ceil(B / LANES) groups, N = J * D. K, J and D are given to
// the compiler. A `vec` is one number for each image of a group. Arrays with a G hold
// [G][...][LANES]; all others are plain row-major tensors.
//
// Notation: s and v as in Procedure 1; c couplings, b logits; dx is the gradient of the loss with
// respect to x.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int int_vec __attribute__((vector_size(LANES * sizeof(int))));

enum { N = J * D };

static inline vec splat(float x) { return x - (vec){}; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// As squash in routing.py: a larger number's square, summed over a capsule, could be infinite.
static inline vec bounded(vec x) {
  const vec most = splat(2e17f);
  x = x > most ? most : x;  // written so that NaN stays NaN
  return x < -most ? -most : x;
}

static inline vec square_root(vec x) {
  vec y;
  for (int lane = 0; lane < LANES; lane++) y[lane] = sqrtf(x[lane]);
  return y;
}

// e^x for x <= 0, to 2e-7 of its value: 2^n e^r with |r| <= ln(2) / 2 and a minimax polynomial
// (Cephes expf).
static inline vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;           // written so that NaN stays NaN
  const vec round = splat(12582912.0f);         // adding 1.5 * 2^23 rounds to an integer
  vec n = (x * 1.44269504f + round) - round;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int_vec power = (__builtin_convertvector(n, int_vec) + 127) << 23;
  return p * (vec)power;
}

static inline vec *allocate(size_t vectors) {
  return (vec *)aligned_alloc(64, (vectors * sizeof(vec) + 63) / 64 * 64);
}

// Copy `width` numbers of each image, `stride` apart from image to image, into lanes, and back.
static void pack(const float *rows, size_t stride, int images, size_t width, vec *packed) {
  for (size_t n = 0; n < width; n++) {
    vec x = {};
    for (int lane = 0; lane < images; lane++) x[lane] = rows[lane * stride + n];
    packed[n] = x;
  }
}

static void unpack(const vec *packed, size_t stride, int images, size_t width, float *rows) {
  for (int lane = 0; lane < images; lane++)
    for (size_t n = 0; n < width; n++) rows[lane * stride + n] = packed[n][lane];
}

// v = s |s| / (1 + |s|²)
static inline void squash(const vec *s, vec *v) {
  for (int j = 0; j < J; j++, s += D, v += D) {
    vec square = {};
    for (int d = 0; d < D; d++) square += s[d] * s[d];
    vec factor = square_root(square) / (1.0f + square);
    for (int d = 0; d < D; d++) v[d] = s[d] * factor;
  }
}

// ds = dv |s| / (1 + |s|²) + s (s·dv) (1 - |s|²) / (|s| (1 + |s|²)²), which is 0 at s = 0
static inline void squash_backward(const vec *s, const vec *dv, vec *ds) {
  for (int j = 0; j < J; j++, s += D, dv += D, ds += D) {
    vec square = {}, product = {};
    for (int d = 0; d < D; d++) {
      square += s[d] * s[d];
      product += s[d] * dv[d];
    }
    vec norm = square_root(square), below = 1.0f + square;
    vec along = product * (1.0f - square) / ((norm == 0.0f ? splat(1.0f) : norm) * below * below);
    along = square > 1e8f ? -product / norm / below : along;  // the same there, without overflow
    for (int d = 0; d < D; d++) ds[d] = dv[d] * norm / below + s[d] * along;
  }
}

// The votes of one input capsule, Eq. 2.
static inline void votes_of(const vec *u, const float *weights, vec *votes) {
  vec mine[K];
  for (int k = 0; k < K; k++) mine[k] = u[k];
  for (int n = 0; n < N; n++) {
    vec sum = mine[0] * weights[n];
    for (int k = 1; k < K; k++) sum += mine[k] * weights[k * N + n];
    votes[n] = sum;
  }
}

// products[j] = sum over d of votes[j][d] * vectors[j][d]
static inline void dot_products(const vec *votes, const vec *vectors, vec *products) {
  for (int j = 0; j < J; j++) {
    vec sum = {};
    for (int d = 0; d < D; d++) sum += votes[j * D + d] * vectors[j * D + d];
    products[j] = sum;
  }
}

// sums[j][d] += factors[j] * votes[j][d]
static inline void add_weighted(const vec *votes, const vec *factors, vec *sums) {
  for (int j = 0; j < J; j++)
    for (int d = 0; d < D; d++) sums[j * D + d] += factors[j] * votes[j * D + d];
}

static inline void softmax(const vec *b, int leaky, vec *c) {
  vec highest = leaky ? (vec){} : b[0];
  for (int j = 0; j < J; j++) highest = larger(b[j], highest);
  vec total = leaky ? exponential(-highest) : (vec){};
  for (int j = 0; j < J; j++) total += c[j] = exponential(b[j] - highest);
  for (int j = 0; j < J; j++) c[j] /= total;
}

extern "C" int lanes() { return LANES; }

// Inputs: u [B][I][K], weights [I][K][J][D], bias [J][D] or null.
// Outputs: v [B][J][D]; and, for the backward pass or null, s of every iteration, sums [B][R][J][D],
// and c of every iteration but the first, whose couplings are all equal, couplings [G][R-1][I][J].
extern "C" void route_forward(const float *u, const float *weights, const float *bias, int B, int I,
                              int R, int leaky, int threads, float *v, float *sums,
                              float *couplings) {
  int groups = (B + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int g = 0; g < groups; g++) {
    size_t first = (size_t)g * LANES;
    int images = B - first < LANES ? B - first : LANES;
    vec *inputs = allocate((size_t)I * K), *logits = allocate((size_t)I * J);
    vec s[N], capsules[N], votes[N], b[J], c[J];
    pack(u + first * I * K, (size_t)I * K, images, (size_t)I * K, inputs);
    for (int r = 0; r < R; r++) {
      vec *kept = couplings && r ? (vec *)couplings + ((size_t)g * (R - 1) + r - 1) * I * J : 0;
      for (int n = 0; n < N; n++) s[n] = (vec){};
      for (int i = 0; i < I; i++) {
        votes_of(inputs + (size_t)i * K, weights + (size_t)i * K * N, votes);
        if (r == 0) {
          for (int n = 0; n < N; n++) s[n] += votes[n];
          continue;
        }
        dot_products(votes, capsules, b);
        for (int j = 0; j < J; j++) {
          if (r > 1) b[j] += logits[i * J + j];
          logits[i * J + j] = b[j];
        }
        softmax(b, leaky, c);
        if (kept) memcpy(kept + (size_t)i * J, c, sizeof c);
        add_weighted(votes, c, s);
      }
      for (int n = 0; n < N; n++) {
        if (r == 0) s[n] /= (float)(J + leaky);  // equal shares; with `leaky` one goes to no one
        if (bias) s[n] += bias[n];
        s[n] = bounded(s[n]);
      }
      squash(s, capsules);
      if (sums) unpack(s, (size_t)R * N, images, N, sums + (first * R + r) * N);
    }
    unpack(capsules, N, images, N, v + first * N);
    free(inputs);
    free(logits);
  }
}

// The gradient of a vote is a sum of 2R - 1 products of a number and a vector,
//   dvotes[i][j][d] = ds_0[j][d] / J + sum over r = 1 … R-1 of
//                     c_r[i][j] ds_r[j][d] + db_r[i][j] v_(r-1)[j][d],
// so these are all that is kept of it: the vectors in `terms` [B][2R-1][J][D] (first ds_0 / J, then
// each ds_r, then each v_(r-1)), and db of every iteration but the first in `dlogits` (as couplings).
//
// Inputs: those of the forward pass, what it kept, and dv [B][J][D].
// Outputs: du, dweights, dsums [B][R][J][D]; terms and dlogits are working space.
extern "C" void route_backward(const float *u, const float *weights, const float *sums,
                               const float *couplings, const float *dv, int B, int I, int R,
                               int leaky, int threads, float *dlogits, float *terms, float *du,
                               float *dweights, float *dsums) {
  int groups = (B + LANES - 1) / LANES, count = 2 * R - 1;
  // First the gradients of each image, a group of them at a time.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int g = 0; g < groups; g++) {
    size_t first = (size_t)g * LANES;
    int images = B - first < LANES ? B - first : LANES;
    vec *inputs = allocate((size_t)I * K), *dinputs = allocate((size_t)I * K);
    vec *vectors = allocate((size_t)count * N);
    vec s[N], dcapsules[N], votes[N], db[J];
    const vec *group_c = (const vec *)couplings + (size_t)g * (R - 1) * I * J;
    vec *group_db = (vec *)dlogits + (size_t)g * (R - 1) * I * J;
    pack(u + first * I * K, (size_t)I * K, images, (size_t)I * K, inputs);
    pack(dv + first * N, N, images, N, dcapsules);
    for (int r = R - 1; r >= 0; r--) {
      vec *ds = vectors + (size_t)r * N;
      pack(sums + (first * R + r) * N, (size_t)R * N, images, N, s);
      squash_backward(s, dcapsules, ds);
      unpack(ds, (size_t)R * N, images, N, dsums + (first * R + r) * N);
      if (r == 0) {
        for (int n = 0; n < N; n++) ds[n] /= (float)(J + leaky);
        break;
      }
      const vec *c = group_c + (size_t)(r - 1) * I * J;
      vec *my_db = group_db + (size_t)(r - 1) * I * J;
      const vec *later_db = r < R - 1 ? my_db + (size_t)I * J : 0;
      for (int n = 0; n < N; n++) dcapsules[n] = (vec){};
      for (int i = 0; i < I; i++, c += J) {
        votes_of(inputs + (size_t)i * K, weights + (size_t)i * K * N, votes);
        dot_products(votes, ds, db);  // now it is dc
        vec mean = {};
        for (int j = 0; j < J; j++) mean += c[j] * db[j];
        for (int j = 0; j < J; j++) {
          db[j] = c[j] * (db[j] - mean);
          if (later_db) db[j] += later_db[i * J + j];
          my_db[i * J + j] = db[j];
        }
        add_weighted(votes, db, dcapsules);
      }
      pack(sums + (first * R + r - 1) * N, (size_t)R * N, images, N, s);
      squash(s, vectors + (size_t)(R - 1 + r) * N);
    }
    for (int i = 0; i < I; i++) {
      const float *mine = weights + (size_t)i * K * N;
      vec sum[K] = {};
      for (int j = 0; j < J; j++) {
        vec dvotes[D];
        for (int d = 0; d < D; d++) dvotes[d] = vectors[j * D + d];
        for (int r = 1; r < R; r++) {
          const vec *ds = vectors + r * N + j * D, *before = ds + (R - 1) * N;
          size_t at = ((size_t)(r - 1) * I + i) * J + j;
          for (int d = 0; d < D; d++) dvotes[d] += group_c[at] * ds[d] + group_db[at] * before[d];
        }
        for (int d = 0; d < D; d++)
          for (int k = 0; k < K; k++) sum[k] += dvotes[d] * mine[k * N + j * D + d];
      }
      memcpy(dinputs + (size_t)i * K, sum, sizeof sum);
    }
    unpack(dinputs, (size_t)I * K, images, (size_t)I * K, du + first * I * K);
    unpack(vectors, (size_t)count * N, images, (size_t)count * N, terms + first * count * N);
    free(inputs);
    free(dinputs);
    free(vectors);
  }
  // Then the gradient of the weights, a sum over images; here a vector register holds d, not images.
  enum { TOGETHER = 4 };  // images added at once, so that a sum is loaded and stored less often
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < I; i++) {
    float sum[K][N] __attribute__((aligned(64))) = {};
    for (int first = 0; first < B; first += TOGETHER) {
      float dvotes[TOGETHER][N] __attribute__((aligned(64))) = {}, inputs[TOGETHER][K] = {};
      for (int n = 0; n < TOGETHER && first + n < B; n++) {
        size_t image = first + n;
        const float *vectors = terms + image * count * N;
        memcpy(inputs[n], u + (image * I + i) * K, sizeof inputs[n]);
        memcpy(dvotes[n], vectors, sizeof dvotes[n]);
        for (int r = 1; r < R; r++)
          for (int j = 0; j < J; j++) {
            size_t row = (image / LANES * (R - 1) + r - 1) * I + i;
            size_t at = (row * J + j) * LANES + image % LANES;
            const float *ds = vectors + r * N + j * D, *before = ds + (R - 1) * N;
            float c = couplings[at], db = dlogits[at];
            for (int d = 0; d < D; d++) dvotes[n][j * D + d] += c * ds[d] + db * before[d];
          }
      }
      for (int k = 0; k < K; k++)
        for (int n = 0; n < N; n++)
          sum[k][n] += inputs[0][k] * dvotes[0][n] + inputs[1][k] * dvotes[1][n] +
                       inputs[2][k] * dvotes[2][n] + inputs[3][k] * dvotes[3][n];
    }
    memcpy(dweights + (size_t)i * K * N, sum, sizeof sum);
  }
}
