// LayerNorm, the residual connection, and the mean and the gate of the FPC.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "vectors.h"

namespace {

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
  // If the squares overflow, the normalised tokens are NaN, as in PyTorch.
  const float variance = sum(squares) / channels + eps;
  return {mean, variance < INFINITY ? 1 / std::sqrt(variance) : NAN};
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
                         const X* residual_grad, const float* weight, float eps,
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
              load(residual_grad + t * channels + c) +
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

// One thread: with more, they would wait for each other longer than they
// compute.
inline void excitation_gate(const float* mean, const float* squeeze,
                            const float* excite, float* hidden, float* gate,
                            int64_t images, int64_t channels, int64_t size) {
  for (int64_t i = 0; i < images; ++i) {
    float* inner = hidden + i * size;
    float* out = gate + i * channels;
    multiply_rows(squeeze, mean + i * channels, inner, size, channels);
    for (int64_t j = 0; j < size; ++j) inner[j] = inner[j] < 0 ? 0 : inner[j];
    multiply_rows(excite, inner, out, channels, size);
    for (int64_t c = 0; c < channels; ++c) out[c] = 1 / (1 + std::exp(-out[c]));
  }
}

}  // namespace
