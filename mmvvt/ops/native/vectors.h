// Vectors of float32, loaded from and stored to float32 or bfloat16, and the
// clamps of the attention.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;  // floats of a vector
#else
constexpr int WIDTH = 8;
#endif
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

inline void add_to(float* p, vec v) { store(p, load(p) + v); }

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

}  // namespace
