// GELU is v * cdf(v) with the distribution function of the normal distribution,
// and its derivative cdf(v) + v * density(v). Both are computed from functions
// of |v|, because cdf(v) - 1/2 is odd.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

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

}  // namespace
