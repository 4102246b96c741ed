// The depthwise convolution of the MLP, with or without GELU.

#pragma once

#include <algorithm>
#include <cstdint>

#include "gelu.h"
#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int TILE = 4;  // columns that a step of the convolution computes

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

}  // namespace
