// Kernels of the strips on CPUs, see mmvvt/ops/strips. They replace chains of
// PyTorch operations that are limited by memory; the large matrix products
// remain PyTorch operations. mmvvt/ops/native/library.py compiles this file
// for the processor on which it runs. It needs C++17, the vector extensions of
// GCC and Clang, and OpenMP.
//
// All arithmetic is float32. Tensors are float32 or bfloat16; the sums over
// tokens, the factors and the weights of the depthwise convolution are
// float32. Shapes use the letters of the Python code: b images, m rows, w
// columns, p = m * w tokens, C, D, R channels, d channels per head, n factors
// per token, of which g depend on the column. Every tensor is contiguous unless
// a stride is given; strides are in elements.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;  // floats of a vector
constexpr int ROWS = 8;    // rows of a product that stay in registers
#else
constexpr int WIDTH = 8;
constexpr int ROWS = 4;
#endif
constexpr int CHUNK = 32;  // tokens of which the features fit into the L1 cache
constexpr int BLOCK = 16;  // numbers that are added in sequence, see Sums
constexpr int TILE = 4;    // columns that a step of the convolution computes
constexpr float CLAMP_MIN = 1e-4f, CLAMP_MAX = 1e4f;  // mmvvt/ops/clamp.py

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));

struct bfloat16 {
  uint16_t bits;
};

inline vec fill(float value) { return vec{} + value; }

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// GCC 12 compiles __builtin_convertvector to several instructions; for these
// two conversions, AVX-512 has one each.
inline vec load(const bfloat16* p) {
  hvec half;
  std::memcpy(&half, p, sizeof(half));
#ifdef __AVX512F__
  return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#else
  return (vec)(__builtin_convertvector(half, uvec) << 16);
#endif
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds to nearest even, as PyTorch does. NaN remains NaN.
inline void store(bfloat16* p, vec v) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  const uvec bits = (uvec)v;
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const hvec half =
      __builtin_convertvector(v == v ? rounded : uvec{} + 0x7fc0, hvec);
#endif
  std::memcpy(p, &half, sizeof(half));
}

// The first `left` elements of a vector, and zeros. If fewer than WIDTH are
// left, they are WIDTH / 2: heads have a multiple of 8 channels.
inline vec load_half(const float* p) {
#ifdef __AVX512F__
  return (vec)_mm512_zextps256_ps512(_mm256_loadu_ps(p));
#else
  vec v{};
  std::memcpy(&v, p, sizeof(v) / 2);
  return v;
#endif
}

inline vec load_half(const bfloat16* p) {
  bfloat16 padded[WIDTH] = {};
  std::memcpy(padded, p, sizeof(padded) / 2);
  return load(padded);
}

template <typename T>
inline vec load_part(const T* p, int64_t left) {
  return left >= WIDTH ? load(p) : load_half(p);
}

template <typename T>
inline void store_part(T* p, vec v, int64_t left) {
  if (left >= WIDTH) return store(p, v);
  T padded[WIDTH];
  store(padded, v);
  std::memcpy(p, padded, sizeof(padded) / 2);
}

inline float sum(vec v) {
  float total = 0;
  for (int i = 0; i < WIDTH; ++i) total += v[i];
  return total;
}

inline vec magnitude(vec v) { return (vec)((uvec)v & 0x7fffffff); }

// The comparisons are written so that NaN remains NaN.
inline vec relu(vec v) { return v < 0 ? vec{} : v; }

inline vec clip(vec v) {
  v = v < CLAMP_MIN ? fill(CLAMP_MIN) : v;
  return v > CLAMP_MAX ? fill(CLAMP_MAX) : v;
}

// sign(v) * clip(|v|, 1e-4, 1e4), the clamp of the official code.
inline vec magnitude_clamp(vec v) {
  const vec clipped =
      (vec)((uvec)clip(magnitude(v)) | ((uvec)v & 0x80000000));
  return v == 0 ? vec{} : clipped;
}

// Where the clamp lets the gradient pass.
inline ivec is_inside(vec v) {
  v = magnitude(v);
  return (v >= CLAMP_MIN) & (v <= CLAMP_MAX);
}

// GELU is v * cdf(v) with the distribution function of the normal distribution,
// and its derivative cdf(v) + v * density(v). Both are computed from functions
// of |v|, because cdf(v) - 1/2 is odd.
#ifdef __AVX512F__
// Polynomials of degree 4 of a function on 31 intervals of [0, BOUND], and its
// limit. A permutation finds the coefficients of each element in two registers.
class Pieces {
 public:
  static constexpr int SIZE = 5;
  static constexpr float BOUND = 5.75f, SCALE = 31 / BOUND;

  template <typename Function>
  Pieces(Function&& function, float limit) {
    for (int i = 0; i < 32; ++i) {
      // Newton's interpolation at the zeros of a Chebyshev polynomial
      double x[SIZE], y[SIZE], p[SIZE] = {};
      for (int j = 0; j < SIZE; ++j) {
        x[j] = std::cos((j + 0.5) * M_PI / SIZE) / 2;
        y[j] = function((i + x[j]) / SCALE);
      }
      for (int k = 1; k < SIZE; ++k)
        for (int j = SIZE - 1; j >= k; --j)
          y[j] = (y[j] - y[j - 1]) / (x[j] - x[j - k]);
      for (int k = SIZE - 1; k >= 0; --k) {
        for (int j = SIZE - 1; j > 0; --j) p[j] = p[j - 1] - x[k] * p[j];
        p[0] = y[k] - x[k] * p[0];
      }
      for (int j = 0; j < SIZE; ++j) coefficients_[j][i] = i < 31 ? p[j] : 0;
      if (i == 31) coefficients_[0][i] = limit;
    }
  }

  // `index` is the number of the interval in its last five bits.
  vec operator()(ivec index, vec fraction) const {
    vec c[SIZE];
    for (int j = 0; j < SIZE; ++j)
      c[j] = (vec)_mm512_permutex2var_ps((__m512)load(coefficients_[j]),
                                         (__m512i)index,
                                         (__m512)load(coefficients_[j] + 16));
    const vec square = fraction * fraction;
    return (c[4] * square + (c[3] * fraction + c[2])) * square +
           (c[1] * fraction + c[0]);
  }

 private:
  float coefficients_[SIZE][32];
};

double half_cdf(double v) { return std::erf(v * M_SQRT1_2) / 2; }
double half_slope(double v) {
  return half_cdf(v) + v * std::exp(v * v / -2) / std::sqrt(2 * M_PI);
}
const Pieces HALF_CDF(half_cdf, 0.5f), HALF_SLOPE(half_slope, 0.5f);

// Interval of |v|, and the position in it, from -1/2 to 1/2.
inline void locate(vec v, ivec* index, vec* fraction) {
  constexpr float MAGIC = 3 << 22;  // adding it rounds to a whole number
  const vec scaled = magnitude(v) * Pieces::SCALE;
  const vec bounded = scaled > 31.0f ? fill(31.0f) : scaled;
  const vec rounded = bounded + MAGIC;
  *index = (ivec)rounded;
  *fraction = bounded - (rounded - MAGIC);
}

// The absolute errors of GELU and of its derivative are below 4e-7.
inline vec gelu(vec v) {
  ivec index;
  vec fraction;
  locate(v, &index, &fraction);
  return magnitude(v) * HALF_CDF(index, fraction) + v * 0.5f;
}

inline void gelu_with_slope(vec v, vec* out, vec* slope) {
  ivec index;
  vec fraction;
  locate(v, &index, &fraction);
  *out = magnitude(v) * HALF_CDF(index, fraction) + v * 0.5f;
  const vec half = HALF_SLOPE(index, fraction);
  *slope = (v < 0 ? -half : half) + 0.5f;
}
#else
// exp(v) for v <= 0, relative error 2e-7. Below -87, the result is exp(-87).
inline vec exponential(vec v) {
  v = v < -87.0f ? fill(-87.0f) : v;
  // v = n * log(2) + r with |r| <= log(2) / 2
  const ivec n = __builtin_convertvector(v * 1.44269504f - 0.5f, ivec);
  const vec whole = __builtin_convertvector(n, vec);
  const vec r = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vec series = fill(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return series * (vec)((n + 127) << 23);
}

// An odd polynomial of degree 27 plus 1/2 inside [-5.25, 5.25], fitted to
// (cdf(v) - 1/2) / v by least squares with Lawson's weights; the absolute
// error in float32 is 1.6e-7.
inline vec normal_cdf(vec v) {
  constexpr float BOUND = 5.25f;
  constexpr float C[] = {
      0.134659364f,   -0.067126652f,  0.0496438981f,  -0.0397686341f,
      0.0320642618f,  -0.0249949312f, 0.0183259968f,  -0.012954385f,
      0.00907037668f, -0.0051199842f, 0.00186944298f, -0.00132634576f,
      0.00145661303f, -0.000560954842f};
  const vec t = v * v * (2 / (BOUND * BOUND)) - 1.0f;
  // Estrin's scheme: terms are added in pairs, so that few instructions wait
  // for the result of another.
  vec terms[7];
  for (int i = 0; i < 7; ++i) terms[i] = t * C[2 * i + 1] + C[2 * i];
  const vec t2 = t * t, t4 = t2 * t2, t8 = t4 * t4;
  const vec low = (terms[3] * t2 + terms[2]) * t4 + (terms[1] * t2 + terms[0]);
  const vec high = terms[6] * t4 + (terms[5] * t2 + terms[4]);
  vec phi = v * (high * t8 + low) + 0.5f;
  phi = v > BOUND ? fill(1.0f) : phi;
  return v < -BOUND ? vec{} : phi;
}

inline vec gelu(vec v) { return v * normal_cdf(v); }

inline void gelu_with_slope(vec v, vec* out, vec* slope) {
  const vec cdf = normal_cdf(v);
  *out = v * cdf;
  // The density of the normal distribution, exp(-v^2 / 2) / sqrt(2 pi)
  *slope = cdf + v * exponential(v * v * -0.5f) * 0.398942280f;
}
#endif

inline int64_t round_up(int64_t number, int64_t step) {
  return (number + step - 1) / step * step;
}
inline int64_t whole_vectors(int64_t size) { return round_up(size, WIDTH); }
inline int64_t whole_rows(int64_t count) { return round_up(count, ROWS); }

// Runs work(first, last, thread) on each thread, for equal parts of the items.
template <typename Work>
void in_parts(int64_t items, int threads, Work&& work) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
    work(items * i / count, items * (i + 1) / count, i);
  }
}

// to[i] += from[i]
inline void add_all(float* to, const float* from, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// Sums of floats over the items of in_parts. Each thread adds BLOCK items to its
// recent sums and calls collect(), which adds them to sums of blocks, BLOCK of
// these to sums of the next level, and so on: small numbers are not added to
// large ones. The sums of the threads are added in their order: the result
// depends on the number of threads, but not on their timing.
class Sums {
 public:
  Sums(int64_t size, int threads)
      : size_(size), levels_(threads), counts_(threads) {
    for (auto& levels : levels_) levels.emplace_back(size);
  }

  float* recent(int64_t thread) { return levels_[thread][0].data(); }

  // Collects sums first to first + size.
  void collect(int64_t thread, int64_t first, int64_t size) {
    auto& levels = levels_[thread];
    int64_t count = ++counts_[thread];
    for (size_t i = 0;; ++i, count /= BLOCK) {
      if (i + 1 == levels.size()) levels.emplace_back(size_);
      float* const from = levels[i].data() + first;
      add_all(levels[i + 1].data() + first, from, size);
      std::fill_n(from, size, 0.0f);
      if (count % BLOCK != 0) return;
    }
  }

  void collect(int64_t thread) { collect(thread, 0, size_); }

  // Returns the sums of all threads. Called once, at the end.
  const float* finish() {
    float* const out = recent(0);
    for (auto& levels : levels_) {
      float* const total = levels[0].data();
      for (size_t i = 1; i < levels.size(); ++i)
        add_all(total, levels[i].data(), size_);
      if (total != out) add_all(out, total, size_);
    }
    return out;
  }

 private:
  int64_t size_;
  std::vector<std::vector<std::vector<float>>> levels_;  // of each thread
  std::vector<int64_t> counts_;  // of the calls of collect()
};

inline void add_to(float* p, vec v) { store(p, load(p) + v); }

// ---- LayerNorm ------------------------------------------------------------

struct Moments {
  float mean, rstd;
};

template <typename X>
Moments moments(const X* x, int64_t channels, float eps) {
  vec total{};
  for (int64_t c = 0; c < channels; c += WIDTH) total += load(x + c);
  const float mean = sum(total) / channels;
  vec squares{};
  for (int64_t c = 0; c < channels; c += WIDTH) {
    const vec centred = load(x + c) - mean;
    squares += centred * centred;
  }
  return {mean, 1 / std::sqrt(sum(squares) / channels + eps)};
}

template <typename X, typename T>
void layer_norm(const X* x, const float* weight, const float* bias, float eps,
                T* out, float* sums, int64_t images, int64_t tokens,
                int64_t channels, int threads) {
  Sums totals(sums ? images * channels : 0, threads);
  in_parts(images * tokens, threads, [&](int64_t t, int64_t last, int64_t i) {
    for (; t < last; ++t) {
      const X* in = x + t * channels;
      const Moments m = moments(in, channels, eps);
      const int64_t image = t / tokens;
      float* total = totals.recent(i) + image * channels;
      for (int64_t c = 0; c < channels; c += WIDTH) {
        const vec normed = (load(in + c) - m.mean) * m.rstd * load(weight + c) +
                           load(bias + c);
        store(out + t * channels + c, normed);
        if (sums) add_to(total + c, normed);
      }
      if (sums && t % BLOCK == 0) totals.collect(i, image * channels, channels);
    }
  });
  if (sums) add_all(sums, totals.finish(), images * channels);
}

template <typename X, typename T>
void layer_norm_backward(const X* x, const T* grad, const float* mean_grad,
                         const X* shortcut, const float* weight, float eps,
                         X* out, float* weight_grad, float* bias_grad,
                         int64_t images, int64_t tokens, int64_t channels,
                         int threads) {
  Sums totals(2 * channels, threads);
  in_parts(images * tokens, threads, [&](int64_t t, int64_t last, int64_t i) {
    float* total = totals.recent(i);
    std::vector<float> line(channels);
    for (; t < last; ++t) {
      const X* in = x + t * channels;
      const float* mean =
          mean_grad ? mean_grad + t / tokens * channels : nullptr;
      const Moments m = moments(in, channels, eps);
      vec sum_grad{}, sum_product{};
      for (int64_t c = 0; c < channels; c += WIDTH) {
        vec g = load(grad + t * channels + c);
        if (mean) g += load(mean + c);
        const vec normed = (load(in + c) - m.mean) * m.rstd;
        add_to(total + c, g * normed);
        add_to(total + channels + c, g);
        g *= load(weight + c);
        store(&line[c], g);
        sum_grad += g;
        sum_product += g * normed;
      }
      const float a = sum(sum_grad) / channels, b = sum(sum_product) / channels;
      for (int64_t c = 0; c < channels; c += WIDTH) {
        const vec normed = (load(in + c) - m.mean) * m.rstd;
        store(out + t * channels + c,
              load(shortcut + t * channels + c) +
                  (load(&line[c]) - a - normed * b) * m.rstd);
      }
      if (t % BLOCK == 0) totals.collect(i);
    }
  });
  const float* const total = totals.finish();
  add_all(weight_grad, total, channels);
  add_all(bias_grad, total + channels, channels);
}

// ---- residual connection --------------------------------------------------

template <typename X, typename T>
void residual(const X* x, const T* branch, const float* gate, bool clamp,
              const float* scale, X* out, int64_t images, int64_t tokens,
              int64_t channels, int threads) {
  in_parts(images * tokens, threads, [&](int64_t t, int64_t last, int64_t) {
    for (; t < last; ++t) {
      const int64_t image = t / tokens;
      const float factor = scale ? scale[image] : 1;
      for (int64_t c = 0; c < channels; c += WIDTH) {
        const int64_t at = t * channels + c;
        vec v = load(branch + at);
        if (clamp) v = magnitude_clamp(v);
        if (gate) v += v * load(gate + image * channels + c);
        if (clamp) v = magnitude_clamp(v);
        store(out + at, load(x + at) + v * factor);
      }
    }
  });
}

template <typename X, typename T>
void residual_backward(const X* grad, const T* branch, const float* gate,
                       bool clamp, const float* scale, T* out,
                       float* gate_grad, float* bias_grad, int64_t images,
                       int64_t tokens, int64_t channels, int threads) {
  Sums gate_sums(images * channels, threads), bias_sums(channels, threads);
  in_parts(images * tokens, threads, [&](int64_t t, int64_t last, int64_t i) {
    for (; t < last; ++t) {
      const int64_t image = t / tokens;
      const float factor = scale ? scale[image] : 1;
      for (int64_t c = 0; c < channels; c += WIDTH) {
        const int64_t at = t * channels + c;
        const vec raw = load(branch + at);
        const vec open = load(gate + image * channels + c) + 1.0f;
        vec clamped = raw;
        vec g = load(grad + at) * factor;
        if (clamp) {
          clamped = magnitude_clamp(raw);
          g = is_inside(clamped * open) ? g : vec{};
        }
        add_to(gate_sums.recent(i) + image * channels + c, g * clamped);
        g *= open;
        if (clamp) g = is_inside(raw) ? g : vec{};
        add_to(bias_sums.recent(i) + c, g);
        store(out + at, g);
      }
      if (t % BLOCK == 0) {
        gate_sums.collect(i, image * channels, channels);
        bias_sums.collect(i);
      }
    }
  });
  add_all(gate_grad, gate_sums.finish(), images * channels);
  add_all(bias_grad, bias_sums.finish(), channels);
}

// ---- sums of tokens and the gate ------------------------------------------

template <typename T>
void sum_tokens(const T* x, float* sums, int64_t tokens, int64_t channels,
                int threads) {
  Sums totals(channels, threads);
  in_parts(tokens, threads, [&](int64_t t, int64_t last, int64_t i) {
    for (; t < last; t += BLOCK) {
      const int64_t end = std::min(t + BLOCK, last);
      for (int64_t c = 0; c < channels; c += WIDTH) {
        vec total{};
        for (int64_t u = t; u < end; ++u)
          total += load_part(x + u * channels + c, channels - c);
        store_part(totals.recent(i) + c, total, channels - c);
      }
      totals.collect(i);
    }
  });
  add_all(sums, totals.finish(), channels);
}

// Product of a vector and each row of a matrix (rows, size).
inline void multiply_rows(const float* matrix, const float* vector, float* out,
                          int64_t rows, int64_t size) {
  for (int64_t i = 0; i < rows; ++i) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < size; ++j)
      total += matrix[i * size + j] * vector[j];
    out[i] = total;
  }
}

// ---- depthwise convolution and GELU -----------------------------------------

// The rows that a 3x3 convolution reads to compute m rows, see Window in
// mmvvt/ops/strips/common.py: a row of zeros at the top of the image, the rows
// of `above`, those of the strip, and zeros. Horizontally, the padding is 1.
template <typename T>
struct Window {
  const T* above;  // (b, above_rows, w, D)
  int64_t above_rows;
  const T* strip;  // (b, strip_rows, w, D)
  int64_t strip_rows;
  bool top;
  int64_t rows, width, channels;

  // Pixel (0, c) of the row above row i of the output, of that row, or of the
  // row below it; null for rows of zeros.
  const T* row(int64_t image, int64_t i, int64_t tap, int64_t c) const {
    int64_t y = i + tap - top;
    if (y < 0) return nullptr;
    const int64_t size = width * channels;
    if (y < above_rows) return above + (image * above_rows + y) * size + c;
    y -= above_rows;
    if (y >= strip_rows) return nullptr;
    return strip + (image * strip_rows + y) * size + c;
  }
};

// Columns x - 1 to x + TILE of a row, 16 channels each; zero outside.
template <bool EDGE, typename T>
inline void columns(const T* row, int64_t x, int64_t width, int64_t channels,
                    vec (&out)[TILE + 2]) {
  for (int j = 0; j < TILE + 2; ++j) {
    const int64_t at = x - 1 + j;
    out[j] = EDGE && (at < 0 || at >= width) ? vec{} : load(row + at * channels);
  }
}

template <bool EDGE, typename T>
inline void convolve(const T* const (&rows)[3], int64_t x, int64_t width,
                     int64_t channels, const float* weight, const float* bias,
                     vec (&out)[TILE]) {
  for (int i = 0; i < TILE; ++i) out[i] = load(bias);
  for (int tap = 0; tap < 3; ++tap) {
    if (!rows[tap]) continue;
    vec column[TILE + 2];
    columns<EDGE>(rows[tap], x, width, channels, column);
    vec w[3];
    for (int k = 0; k < 3; ++k) w[k] = load(weight + (3 * tap + k) * channels);
    for (int i = 0; i < TILE; ++i)
      out[i] += column[i] * w[0] + column[i + 1] * w[1] + column[i + 2] * w[2];
  }
}

// Computes TILE columns of a row, from column x on. `out` is pixel x of the
// output.
template <bool GELU, bool EDGE, typename T>
void depthwise_tile(const Window<T>& in, int64_t image, int64_t row, int64_t x,
                    const float* weight, const float* bias, T* out) {
  const int64_t count = std::min<int64_t>(TILE, in.width - x);
  for (int64_t c = 0; c < in.channels; c += WIDTH) {
    const T* const rows[] = {in.row(image, row, 0, c), in.row(image, row, 1, c),
                             in.row(image, row, 2, c)};
    vec mixed[TILE];
    convolve<EDGE>(rows, x, in.width, in.channels, weight + c,
                   bias + c, mixed);
    for (int i = 0; i < (EDGE ? count : TILE); ++i)
      store(out + i * in.channels + c,
            GELU ? gelu(mixed[i]) : mixed[i]);
  }
}

// Calls tile(is_edge, image, row, x, at, thread) for all tiles, and
// finish(thread) after each row. `at` is the index of the first output.
template <typename T, typename Tile, typename Finish>
void over_tiles(const Window<T>& in, int64_t images, int threads, Tile&& tile,
                Finish&& finish) {
  in_parts(images * in.rows, threads,
           [&](int64_t i, int64_t last, int64_t thread) {
    for (; i < last; ++i) {
      for (int64_t x = 0; x < in.width; x += TILE)
        tile(x == 0 || x + TILE >= in.width, i / in.rows, i % in.rows, x,
             (i * in.width + x) * in.channels, thread);
      finish(thread);
    }
  });
}

template <bool GELU, typename T>
void depthwise(const Window<T>& in, const float* weight, const float* bias,
               T* out, int64_t images, int threads) {
  over_tiles(
      in, images, threads,
      [&](bool edge, int64_t image, int64_t row, int64_t x, int64_t at,
          int64_t) {
        (edge ? depthwise_tile<GELU, true, T> : depthwise_tile<GELU, false, T>)(
            in, image, row, x, weight, bias, out + at);
      },
      [](int64_t) {});
}

// `sums` are the gradients of the weight, (9, D), followed by those of the
// bias, (D).
template <bool EDGE, typename T>
void depthwise_gelu_backward_tile(const Window<T>& in, int64_t image, int64_t row,
                             int64_t x, const float* weight, const float* bias,
                             const T* grad, T* active, T* mixed_grad,
                             float* sums) {
  const int64_t channels = in.channels;
  const int64_t count = std::min<int64_t>(TILE, in.width - x);
  for (int64_t c = 0; c < channels; c += WIDTH) {
    const T* const rows[] = {in.row(image, row, 0, c), in.row(image, row, 1, c),
                             in.row(image, row, 2, c)};
    vec mixed[TILE], g[TILE];
    convolve<EDGE>(rows, x, in.width, channels, weight + c, bias + c, mixed);
    vec total{};
    for (int i = 0; i < TILE; ++i) {
      if (EDGE && i >= count) {
        g[i] = vec{};
        continue;
      }
      const int64_t at = i * channels + c;
      vec out, slope;
      gelu_with_slope(mixed[i], &out, &slope);
      store(active + at, out);
      g[i] = load(grad + at) * slope;
      store(mixed_grad + at, g[i]);
      total += g[i];
    }
    add_to(sums + 9 * channels + c, total);
    for (int tap = 0; tap < 3; ++tap) {
      if (!rows[tap]) continue;
      vec column[TILE + 2];
      columns<EDGE>(rows[tap], x, in.width, channels, column);
      for (int k = 0; k < 3; ++k) {
        vec product{};
        for (int i = 0; i < TILE; ++i) product += column[i + k] * g[i];
        add_to(sums + (3 * tap + k) * channels + c, product);
      }
    }
  }
}

template <typename T>
void depthwise_gelu_backward(const Window<T>& in, const float* weight,
                        const float* bias, const T* grad, T* active,
                        T* mixed_grad, float* sums, int64_t images,
                        int threads) {
  Sums totals(10 * in.channels, threads);
  over_tiles(
      in, images, threads,
      [&](bool edge, int64_t image, int64_t row, int64_t x, int64_t at,
          int64_t thread) {
        (edge ? depthwise_gelu_backward_tile<true, T>
              : depthwise_gelu_backward_tile<false, T>)(
            in, image, row, x, weight, bias, grad + at, active + at,
            mixed_grad + at, totals.recent(thread));
      },
      [&](int64_t thread) { totals.collect(thread); });
  add_all(sums, totals.finish(), 10 * in.channels);
}

// ---- attention ------------------------------------------------------------

// Computes C (rows, cols) = A (rows, depth) @ B (depth, cols), or adds the
// product to C. Element (i, k) of A is a[i * a_row + k * a_col]. `rows` is a
// multiple of ROWS, and `cols` of COLS * WIDTH.
template <int COLS>
void product(const float* a, int64_t a_row, int64_t a_col, const float* b,
             int64_t b_row, float* c, int64_t c_row, int64_t rows,
             int64_t cols, int64_t depth, bool add) {
  for (int64_t i = 0; i < rows; i += ROWS) {
    for (int64_t j = 0; j < cols; j += COLS * WIDTH) {
      vec total[ROWS][COLS];
      for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < COLS; ++s)
          total[r][s] = vec{};
      for (int64_t k = 0; k < depth; ++k) {
        vec line[COLS];
        for (int s = 0; s < COLS; ++s)
          line[s] = load(b + k * b_row + j + s * WIDTH);
        for (int r = 0; r < ROWS; ++r) {
          const float value = a[(i + r) * a_row + k * a_col];
          for (int s = 0; s < COLS; ++s) total[r][s] += line[s] * value;
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        for (int s = 0; s < COLS; ++s) {
          float* out = c + (i + r) * c_row + j + s * WIDTH;
          store(out, add ? load(out) + total[r][s] : total[r][s]);
        }
      }
    }
  }
}

void multiply(const float* a, int64_t a_row, int64_t a_col, const float* b,
              int64_t b_row, float* c, int64_t c_row, int64_t rows,
              int64_t cols, int64_t depth, bool add = false) {
  if (cols % (3 * WIDTH) == 0)
    product<3>(a, a_row, a_col, b, b_row, c, c_row, rows, cols, depth, add);
  else if (cols % (2 * WIDTH) == 0)
    product<2>(a, a_row, a_col, b, b_row, c, c_row, rows, cols, depth, add);
  else
    product<1>(a, a_row, a_col, b, b_row, c, c_row, rows, cols, depth, add);
}

// The attention of a strip. A token has n factors: those of row i and column x
// are of_rows[i] (n, g) @ of_columns[x] (g). Features with g instead of n
// blocks are multiplied, and the products of a row are combined with those of
// the other rows.
struct Heads {
  int64_t images, rows, width, heads, n, g, d;
  const float* of_rows;     // (m, n, g)
  const float* of_columns;  // (w, g)

  // Channels of a head and of its features, filled up to whole vectors.
  int64_t padded() const { return whole_vectors(d); }
  int64_t wide() const { return whole_vectors(g * d); }
  const float* row(int64_t i) const { return of_rows + i * n * g; }
  const float* column(int64_t x) const { return of_columns + x * g; }
};

// Features of `count` tokens of a head, (count, wide): channel i of block j is
// relu(t[i]) * factors[j]. If `weights`, (g * d), is given, `dots`, (count),
// are the products of the features with the weights.
template <typename T>
void features(const T* tokens, int64_t stride, const float* factors,
              int64_t count, const Heads& at, const float* weights, float* out,
              float* dots) {
  const int64_t g = at.g, d = at.d, wide = at.wide();
  for (int64_t t = 0; t < count; ++t) {
    vec dot{};
    for (int64_t i = 0; i < d; i += WIDTH) {
      const vec v = relu(load_part(tokens + t * stride + i, d - i));
      for (int64_t j = 0; j < g; ++j) {
        const vec feature = v * factors[t * g + j];
        store_part(out + t * wide + j * d + i, feature, d - i);
        if (weights) dot += feature * load_part(weights + j * d + i, d - i);
      }
    }
    if (weights) dots[t] = sum(dot);
  }
}

// Gradient of the tokens, from that of their features: the sum over the g
// blocks, where the token is positive.
template <typename T>
void fold(const float* grads, const float* factors, const T* tokens,
          int64_t stride, int64_t count, const Heads& at, T* out) {
  const int64_t g = at.g, d = at.d, wide = at.wide();
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < d; i += WIDTH) {
      vec total{};
      for (int64_t j = 0; j < g; ++j)
        total += load_part(grads + t * wide + j * d + i, d - i) *
                 factors[t * g + j];
      const vec token = load_part(tokens + t * stride + i, d - i);
      store_part(out + t * stride + i, token > 0 ? total : vec{}, d - i);
    }
  }
}

// Copies `count` tokens to float32, (count, padded).
template <typename T>
void gather(const T* tokens, int64_t stride, int64_t count, const Heads& at,
            float* out) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < at.d; i += WIDTH)
      store(out + t * at.padded() + i,
            load_part(tokens + t * stride + i, at.d - i));
}

// out[i] += factor * in[i]
inline void add_scaled(float* out, const float* in, float factor,
                       int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] += factor * in[i];
}

// The sums of one head, (n * d, d + 1), in the layouts that products need:
// matrices (n, d, padded), their transposes (n, padded, d), and the last
// column, (n, d). The columns from d on are zero.
struct Matrices {
  std::vector<float> values, transposed, column;

  Matrices(const float* sums, const Heads& at, bool clamp)
      : values(at.n * at.d * at.padded()),
        transposed(values.size()),
        column(at.n * at.d) {
    const int64_t d = at.d, padded = at.padded();
    for (int64_t row = 0; row < at.n * d; ++row, sums += d + 1) {
      float* line = &values[row * padded];
      std::copy(sums, sums + d, line);
      if (clamp)
        for (int64_t j = 0; j < padded; j += WIDTH)
          store(line + j, magnitude_clamp(load(line + j)));
      for (int64_t j = 0; j < d; ++j)
        transposed[(row / d * padded + j) * d + row % d] = line[j];
      column[row] = sums[d];
    }
  }
};

// If `clamp`, the sums are clamped, except for the last column.
std::vector<Matrices> all_matrices(const float* sums, const Heads& at,
                                   bool clamp) {
  std::vector<Matrices> all;
  for (int64_t i = 0; i < at.images * at.heads; ++i)
    all.emplace_back(sums + i * at.n * at.d * (at.d + 1), at, clamp);
  return all;
}

// The matrices of a head, combined for one row of tokens: a matrix
// (g * d, padded), its transpose (padded, wide) and the column (g * d).
class RowMatrix {
 public:
  std::vector<float> values, transposed, column;

  explicit RowMatrix(const Heads& at)
      : values(at.g * at.d * at.padded()),
        transposed(at.padded() * at.wide()),
        column(at.g * at.d) {}

  void combine(const Matrices& from, const Heads& at, int64_t row,
               bool transpose) {
    const int64_t d = at.d, size = d * at.padded();
    std::fill(values.begin(), values.end(), 0.0f);
    std::fill(column.begin(), column.end(), 0.0f);
    if (transpose) std::fill(transposed.begin(), transposed.end(), 0.0f);
    for (int64_t i = 0; i < at.n; ++i) {
      for (int64_t j = 0; j < at.g; ++j) {
        const float factor = at.row(row)[i * at.g + j];
        if (factor == 0) continue;
        add_scaled(&values[j * size], &from.values[i * size], factor, size);
        add_scaled(&column[j * d], &from.column[i * d], factor, d);
        if (!transpose) continue;
        for (int64_t k = 0; k < d; ++k)
          add_scaled(&transposed[k * at.wide() + j * d],
                     &from.transposed[i * size + k * d], factor, d);
      }
    }
  }
};

// Sums of products of each head: matrices (n, d, padded) and a column (n, d).
class ProductSums {
 public:
  ProductSums(const Heads& at, int threads)
      : at_(at),
        size_(at.n * at.d * (at.padded() + 1)),
        totals_(at.images * at.heads * size_, threads) {}

  // Adds the products of a row: a matrix (g * d, padded) and a column (g * d).
  void add(int64_t thread, int64_t head, int64_t row, const float* values,
           const float* column) {
    const int64_t d = at_.d, size = d * at_.padded();
    float* total = totals_.recent(thread) + head * size_;
    for (int64_t i = 0; i < at_.n; ++i) {
      for (int64_t j = 0; j < at_.g; ++j) {
        const float factor = at_.row(row)[i * at_.g + j];
        if (factor == 0) continue;
        add_scaled(total + i * size, values + j * size, factor, size);
        add_scaled(total + at_.n * size + i * d, column + j * d, factor, d);
      }
    }
  }

  // Adds to sums of shape (b, heads, n * d, d + 1).
  void add_to_sums(float* sums) {
    const int64_t padded = at_.padded(), d = at_.d, rows = at_.n * d;
    const float* total = totals_.finish();
    for (int64_t head = 0; head < at_.images * at_.heads; ++head) {
      for (int64_t row = 0; row < rows; ++row, sums += d + 1) {
        add_all(sums, total + row * padded, d);
        sums[d] += total[rows * padded + row];
      }
      total += size_;
    }
  }

 private:
  Heads at_;
  int64_t size_;
  Sums totals_;
};

// Products of the features and values of a part of a row of tokens.
class RowProducts {
 public:
  explicit RowProducts(const Heads& at)
      : at_(at), values_(at.g * at.d * at.padded()), column_(at.g * at.d) {}

  void clear() {
    std::fill(values_.begin(), values_.end(), 0.0f);
    std::fill(column_.begin(), column_.end(), 0.0f);
  }

  // Adds features^T (g * d, count) @ values (count, padded), and to the column
  // the sum of the features, each times its weight if there are any.
  void add(const float* features, const float* values, const float* weights,
           int64_t count) {
    const int64_t size = at_.g * at_.d, padded = at_.padded();
    multiply(features, 1, at_.wide(), values, padded, values_.data(), padded,
             size, padded, count, true);
    for (int64_t t = 0; t < count; ++t)
      add_scaled(column_.data(), features + t * at_.wide(),
                 weights ? weights[t] : 1, size);
  }

  void add_to(ProductSums& sums, int64_t thread, int64_t head,
              int64_t row) const {
    sums.add(thread, head, row, values_.data(), column_.data());
  }

 private:
  Heads at_;
  std::vector<float> values_, column_;
};

// Calls work(image, row, first, last) for all columns, in parts that begin at
// multiples of CHUNK. make_work(thread) returns this function.
template <typename MakeWork>
void over_rows(const Heads& at, int threads, MakeWork&& make_work) {
  const int64_t chunks = (at.width + CHUNK - 1) / CHUNK;
  const int64_t items = at.images * at.rows * chunks;
  in_parts(items, threads, [&](int64_t i, int64_t last, int64_t thread) {
    auto work = make_work(thread);
    while (i < last) {
      const int64_t row = i / chunks, first = row * chunks;
      const int64_t end = std::min(last, first + chunks);
      work(row / at.rows, row % at.rows, (i - first) * CHUNK,
           std::min(at.width, (end - first) * CHUNK));
      i = end;
    }
  });
}

// First channel of a token of a head.
template <typename T>
T* of_token(T* data, int64_t stride, const Heads& at, int64_t image,
            int64_t row, int64_t x, int64_t head) {
  return data + ((image * at.rows + row) * at.width + x) * stride + head * at.d;
}

template <typename T>
void sum_products(const T* keys, const T* values, int64_t stride, float* sums,
                  const Heads& at, int threads) {
  ProductSums totals(at, threads);
  over_rows(at, threads, [&](int64_t thread) {
    return [&, thread, wide = std::vector<float>(CHUNK * at.wide()),
            narrow = std::vector<float>(CHUNK * at.padded()),
            products = RowProducts(at)](int64_t image, int64_t row,
                                        int64_t first, int64_t last) mutable {
      for (int64_t head = 0; head < at.heads; ++head) {
        products.clear();
        for (int64_t x = first; x < last; x += CHUNK) {
          const int64_t count = std::min<int64_t>(CHUNK, last - x);
          features(of_token(keys, stride, at, image, row, x, head), stride,
                   at.column(x), count, at, nullptr, wide.data(),
                   nullptr);
          gather(of_token(values, stride, at, image, row, x, head), stride,
                 count, at, narrow.data());
          products.add(wide.data(), narrow.data(), nullptr, count);
        }
        products.add_to(totals, thread, image * at.heads + head, row);
      }
    };
  });
  totals.add_to_sums(sums);
}

template <typename X, typename T>
void attend(const X* queries, int64_t stride, const float* sums, bool clamp,
            float eps, T* out, const Heads& at, int threads) {
  const std::vector<Matrices> all = all_matrices(sums, at, clamp);
  const int64_t reduced = at.heads * at.d, padded = at.padded();
  over_rows(at, threads, [&](int64_t) {
    return [&, wide = std::vector<float>(CHUNK * at.wide()),
            top = std::vector<float>(CHUNK * padded), matrix = RowMatrix(at)](
               int64_t image, int64_t row, int64_t first,
               int64_t last) mutable {
      float weight[CHUNK];
      for (int64_t head = 0; head < at.heads; ++head) {
        matrix.combine(all[image * at.heads + head], at, row, false);
        for (int64_t x = first; x < last; x += CHUNK) {
          const int64_t count = std::min<int64_t>(CHUNK, last - x);
          features(of_token(queries, stride, at, image, row, x, head), stride,
                   at.column(x), count, at, matrix.column.data(),
                   wide.data(), weight);
          multiply(wide.data(), at.wide(), 1, matrix.values.data(), padded,
                   top.data(), padded, whole_rows(count), padded, at.g * at.d);
          T* merged = of_token(out, reduced, at, image, row, x, head);
          for (int64_t t = 0; t < count; ++t) {
            vec factor = fill(1 / (weight[t] + eps));
            if (clamp) factor = clip(factor);
            for (int64_t i = 0; i < at.d; i += WIDTH) {
              vec v = load(&top[t * padded + i]);
              v = clamp ? magnitude_clamp(magnitude_clamp(v) * factor)
                        : v * factor;
              store_part(merged + t * reduced + i, v, at.d - i);
            }
          }
        }
      }
    };
  });
}

// Gradients of `attend`: those of the queries and of the sums. Also computes
// the output again.
template <typename T>
void attend_backward(const T* queries, int64_t stride, const float* sums,
                     bool clamp, float eps, const T* grad, T* out,
                     T* query_grad, float* sums_grad, const Heads& at,
                     int threads) {
  const std::vector<Matrices> all = all_matrices(sums, at, clamp);
  const int64_t reduced = at.heads * at.d, padded = at.padded();
  const int64_t size = at.wide();
  ProductSums totals(at, threads);
  over_rows(at, threads, [&](int64_t thread) {
    return [&, thread, wide = std::vector<float>(CHUNK * size),
            wide_grad = std::vector<float>(CHUNK * size),
            top = std::vector<float>(CHUNK * padded),
            top_grad = std::vector<float>(CHUNK * padded),
            matrix = RowMatrix(at), products = RowProducts(at)](
               int64_t image, int64_t row, int64_t first,
               int64_t last) mutable {
      float weight[CHUNK], weight_grad[CHUNK];
      for (int64_t head = 0; head < at.heads; ++head) {
        matrix.combine(all[image * at.heads + head], at, row, true);
        products.clear();
        for (int64_t x = first; x < last; x += CHUNK) {
          const int64_t count = std::min<int64_t>(CHUNK, last - x);
          const T* tokens = of_token(queries, stride, at, image, row, x, head);
          const float* factors = at.column(x);
          features(tokens, stride, factors, count, at, matrix.column.data(),
                   wide.data(), weight);
          multiply(wide.data(), size, 1, matrix.values.data(), padded,
                   top.data(), padded, whole_rows(count), padded, at.g * at.d);
          const T* in = of_token(grad, reduced, at, image, row, x, head);
          T* merged = of_token(out, reduced, at, image, row, x, head);
          for (int64_t t = 0; t < count; ++t) {
            const float inverse = 1 / (weight[t] + eps);
            vec clipped = fill(inverse);
            if (clamp) clipped = clip(clipped);
            vec dot{};
            for (int64_t i = 0; i < at.d; i += WIDTH) {
              const vec raw = load(&top[t * padded + i]);
              vec g = load_part(in + t * reduced + i, at.d - i);
              const vec clamped = clamp ? magnitude_clamp(raw) : raw;
              const vec quotient = clamped * clipped;
              if (clamp) g = is_inside(quotient) ? g : vec{};
              store_part(merged + t * reduced + i,
                         clamp ? magnitude_clamp(quotient) : quotient,
                         at.d - i);
              dot += g * clamped;
              g *= clipped;
              if (clamp) g = is_inside(raw) ? g : vec{};
              store(&top_grad[t * padded + i], g);
            }
            const bool passes = !clamp || is_inside(fill(inverse))[0];
            weight_grad[t] = passes ? -sum(dot) * inverse * inverse : 0;
          }
          products.add(wide.data(), top_grad.data(), weight_grad, count);
          multiply(top_grad.data(), padded, 1, matrix.transposed.data(), size,
                   wide_grad.data(), size, whole_rows(count), size, at.d);
          for (int64_t t = 0; t < count; ++t)
            add_scaled(&wide_grad[t * size], matrix.column.data(),
                       weight_grad[t], at.g * at.d);
          fold(wide_grad.data(), factors, tokens, stride, count, at,
               of_token(query_grad, stride, at, image, row, x, head));
        }
        products.add_to(totals, thread, image * at.heads + head, row);
      }
    };
  });
  totals.add_to_sums(sums_grad);
}

// Gradients of `sum_products`: those of the keys and of the values.
template <typename T>
void sum_products_backward(const T* keys, const T* values, int64_t stride,
                           const float* sums_grad, T* key_grad, T* value_grad,
                           const Heads& at, int threads) {
  const std::vector<Matrices> all = all_matrices(sums_grad, at, false);
  const int64_t padded = at.padded(), size = at.wide();
  over_rows(at, threads, [&](int64_t) {
    return [&, wide = std::vector<float>(CHUNK * size),
            narrow = std::vector<float>(CHUNK * padded),
            matrix = RowMatrix(at)](int64_t image, int64_t row, int64_t first,
                                    int64_t last) mutable {
      for (int64_t head = 0; head < at.heads; ++head) {
        matrix.combine(all[image * at.heads + head], at, row, true);
        for (int64_t x = first; x < last; x += CHUNK) {
          const int64_t count = std::min<int64_t>(CHUNK, last - x);
          const T* tokens = of_token(keys, stride, at, image, row, x, head);
          const float* factors = at.column(x);
          gather(of_token(values, stride, at, image, row, x, head), stride,
                 count, at, narrow.data());
          multiply(narrow.data(), padded, 1, matrix.transposed.data(), size,
                   wide.data(), size, whole_rows(count), size, at.d);
          for (int64_t t = 0; t < count; ++t)
            add_scaled(&wide[t * size], matrix.column.data(), 1, at.g * at.d);
          fold(wide.data(), factors, tokens, stride, count, at,
               of_token(key_grad, stride, at, image, row, x, head));
          features(tokens, stride, factors, count, at, nullptr, wide.data(),
                   nullptr);
          multiply(wide.data(), size, 1, matrix.values.data(), padded,
                   narrow.data(), padded, whole_rows(count), padded,
                   at.g * at.d);
          T* grads = of_token(value_grad, stride, at, image, row, x, head);
          for (int64_t t = 0; t < count; ++t)
            for (int64_t i = 0; i < at.d; i += WIDTH)
              store_part(grads + t * stride + i, load(&narrow[t * padded + i]),
                         at.d - i);
        }
      }
    };
  });
}

}  // namespace

// ---- functions that Python calls ------------------------------------------
//
// Inputs and outputs of type void are float32 or bfloat16: the tokens and the
// queries by x_half, all other activations by half.

namespace {

template <typename Work>
void with_type(bool half, Work&& work) {
  half ? work(bfloat16{}) : work(0.0f);
}

}  // namespace

extern "C" {

// Numbers of channels must be multiples of this, those of a head of 8.
int mmvvt_vector_width() { return WIDTH; }

// x, out: (b, p, C). weight, bias: (C). sums: (b, C), which the sums of the
// normalised tokens are added to, or null.
void mmvvt_layer_norm(const void* x, bool x_half, const float* weight,
                      const float* bias, float eps, void* out, bool half,
                      float* sums, int64_t images, int64_t tokens,
                      int64_t channels, int threads) {
  with_type(x_half, [&](auto x_type) {
    with_type(half, [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      layer_norm((const X*)x, weight, bias, eps, (T*)out, sums, images, tokens,
                 channels, threads);
    });
  });
}

// x, shortcut, out: (b, p, C). grad: (b, p, C), the gradient of the output of
// the LayerNorm; mean_grad: (b, C), added to the gradient of each token, or
// null. out = shortcut + gradient of x. weight, weight_grad, bias_grad: (C).
void mmvvt_layer_norm_backward(const void* x, bool x_half, const void* grad,
                               bool half, const float* mean_grad,
                               const void* shortcut, const float* weight,
                               float eps, void* out, float* weight_grad,
                               float* bias_grad, int64_t images,
                               int64_t tokens, int64_t channels, int threads) {
  with_type(x_half, [&](auto x_type) {
    with_type(half, [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      layer_norm_backward((const X*)x, (const T*)grad, mean_grad,
                          (const X*)shortcut, weight, eps, (X*)out,
                          weight_grad, bias_grad, images, tokens, channels,
                          threads);
    });
  });
}

// x, branch, out: (b, p, C). gate: (b, C) or null. scale: (b) or null.
void mmvvt_residual(const void* x, bool x_half, const void* branch, bool half,
                    const float* gate, bool clamp, const float* scale,
                    void* out, int64_t images, int64_t tokens,
                    int64_t channels, int threads) {
  with_type(x_half, [&](auto x_type) {
    with_type(half, [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      residual((const X*)x, (const T*)branch, gate, clamp, scale, (X*)out,
               images, tokens, channels, threads);
    });
  });
}

// grad, branch, out: (b, p, C). gate, gate_grad: (b, C). bias_grad: (C).
void mmvvt_residual_backward(const void* grad, bool x_half, const void* branch,
                             bool half, const float* gate, bool clamp,
                             const float* scale, void* out, float* gate_grad,
                             float* bias_grad, int64_t images, int64_t tokens,
                             int64_t channels, int threads) {
  with_type(x_half, [&](auto x_type) {
    with_type(half, [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      residual_backward((const X*)grad, (const T*)branch, gate, clamp, scale,
                        (T*)out, gate_grad, bias_grad, images, tokens,
                        channels, threads);
    });
  });
}

// x: (p, C). sums: (C), which the sums of the tokens are added to. C is a
// multiple of 8: the projections have 3 * heads * d channels.
void mmvvt_sum_tokens(const void* x, bool half, float* sums, int64_t tokens,
                      int64_t channels, int threads) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    sum_tokens((const T*)x, sums, tokens, channels, threads);
  });
}

// mean, gate: (b, C). squeeze: (S, C). excite: (C, S). hidden: (b, S). One
// thread: with more, they would wait for each other longer than they compute.
void mmvvt_gate(const float* mean, const float* squeeze, const float* excite,
                float* hidden, float* gate, int64_t images, int64_t channels,
                int64_t size, int) {
  for (int64_t i = 0; i < images; ++i) {
    float* inner = hidden + i * size;
    float* out = gate + i * channels;
    multiply_rows(squeeze, mean + i * channels, inner, size, channels);
    for (int64_t j = 0; j < size; ++j) inner[j] = inner[j] < 0 ? 0 : inner[j];
    multiply_rows(excite, inner, out, channels, size);
    for (int64_t c = 0; c < channels; ++c) out[c] = 1 / (1 + std::exp(-out[c]));
  }
}

// above, strip, top: see Window. weight: (9, D). bias: (D). out: (b, m, w, D).
void mmvvt_depthwise(const void* above, int64_t above_rows, const void* strip,
                     int64_t strip_rows, bool top, bool half,
                     const float* weight, const float* bias, bool gelu,
                     void* out, int64_t images, int64_t rows, int64_t width,
                     int64_t channels, int threads) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const Window<T> window{(const T*)above, above_rows, (const T*)strip,
                           strip_rows, top, rows, width, channels};
    (gelu ? depthwise<true, T> : depthwise<false, T>)(
        window, weight, bias, (T*)out, images, threads);
  });
}

// grad, active, mixed_grad: (b, m, w, D), the gradient of the output of the
// GELU, this output, and the gradient of its input. sums: (10, D), see
// depthwise_gelu_backward_tile; they are added to. Others: see mmvvt_depthwise.
void mmvvt_depthwise_gelu_backward(
    const void* above, int64_t above_rows, const void* strip,
    int64_t strip_rows, bool top, bool half, const float* weight,
    const float* bias, const void* grad, void* active, void* mixed_grad,
    float* sums, int64_t images, int64_t rows, int64_t width, int64_t channels,
    int threads) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const Window<T> window{(const T*)above, above_rows, (const T*)strip,
                           strip_rows, top, rows, width, channels};
    depthwise_gelu_backward(window, weight, bias, (const T*)grad, (T*)active,
                            (T*)mixed_grad, sums, images, threads);
  });
}

// The attention of strips (b, m, w, .). of_rows: (m, n, g), of_columns: (w, g),
// see Heads. keys, values: (b, m, w, heads * d), tokens stride apart.
// sums: (b, heads, n * d, d + 1), which the products are added to.
void mmvvt_sum_products(const void* keys, const void* values, bool half,
                        int64_t stride, float* sums, int64_t images,
                        int64_t rows, int64_t width, int64_t heads, int64_t n,
                        int64_t g, int64_t d, const float* of_rows,
                        const float* of_columns, int threads) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    sum_products((const T*)keys, (const T*)values, stride, sums,
                 Heads{images, rows, width, heads, n, g, d, of_rows,
                       of_columns},
                 threads);
  });
}

// key_grad, value_grad: like keys and values. sums_grad: like sums.
void mmvvt_sum_products_backward(
    const void* keys, const void* values, bool half, int64_t stride,
    const float* sums_grad, void* key_grad, void* value_grad, int64_t images,
    int64_t rows, int64_t width, int64_t heads, int64_t n, int64_t g, int64_t d,
    const float* of_rows, const float* of_columns, int threads) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    sum_products_backward((const T*)keys, (const T*)values, stride, sums_grad,
                          (T*)key_grad, (T*)value_grad,
                          Heads{images, rows, width, heads, n, g, d, of_rows,
                       of_columns},
                          threads);
  });
}

// queries: (b, m, w, heads * d), tokens stride apart. sums:
// (b, heads, n * d, d + 1), before the clamp. out: (b, m, w, heads * d).
void mmvvt_attend(const void* queries, bool x_half, int64_t stride,
                  const float* sums, bool clamp, float eps, void* out,
                  bool half, int64_t images, int64_t rows, int64_t width,
                  int64_t heads, int64_t n, int64_t g, int64_t d,
                  const float* of_rows, const float* of_columns, int threads) {
  with_type(x_half, [&](auto x_type) {
    with_type(half, [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      attend((const X*)queries, stride, sums, clamp, eps, (T*)out,
             Heads{images, rows, width, heads, n, g, d, of_rows,
                       of_columns},
             threads);
    });
  });
}

// grad, out: (b, m, w, heads * d). query_grad: like queries. sums_grad: like
// sums; the gradient of the clamped sums is added to it.
void mmvvt_attend_backward(const void* queries, bool half, int64_t stride,
                           const float* sums, bool clamp, float eps,
                           const void* grad, void* out, void* query_grad,
                           float* sums_grad, int64_t images, int64_t rows,
                           int64_t width, int64_t heads, int64_t n, int64_t g,
                           int64_t d, const float* of_rows,
                           const float* of_columns, int threads) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    attend_backward((const T*)queries, stride, sums, clamp, eps,
                    (const T*)grad, (T*)out, (T*)query_grad, sums_grad,
                    Heads{images, rows, width, heads, n, g, d, of_rows,
                       of_columns},
                    threads);
  });
}

}  // extern "C"
