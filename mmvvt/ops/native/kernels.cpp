// Kernels of the strips on CPUs, see mmvvt/ops/strips: the functions that Python
// calls. They replace chains of PyTorch operations that are limited by memory;
// the large matrix products remain PyTorch operations.
// mmvvt/ops/native/library.py compiles this file for the processor on which it
// runs. It needs C++17, the vector extensions of GCC and Clang, and OpenMP.
//
// All arithmetic is float32. Tensors are float32 or bfloat16; the sums over
// tokens, the factors and the weights of the depthwise convolution are
// float32. Shapes use the letters of the Python code: b images, m rows, w
// columns, p = m * w tokens, C, D, R channels, d channels per head, n factors
// per token, of which g depend on the column. Every tensor is contiguous unless
// a stride is given; strides are in elements.
//
// Inputs and outputs of type void are float32 or bfloat16: the tokens and the
// queries by x_half, all other activations by half.

#include <cstdint>

#include "attention.h"
#include "depthwise.h"
#include "tokens.h"
#include "vectors.h"

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

// x, residual_grad, out: (b, p, C). grad: (b, p, C), the gradient of the output
// of the LayerNorm; mean_grad: (b, C), added to the gradient of each token, or
// null. weight, weight_grad, bias_grad: (C). out is the sum of residual_grad and
// the gradient of x.
void mmvvt_layer_norm_backward(const void* x, bool x_half, const void* grad,
                               bool half, const float* mean_grad,
                               const void* residual_grad, const float* weight,
                               float eps, void* out, float* weight_grad,
                               float* bias_grad, int64_t images,
                               int64_t tokens, int64_t channels, int threads) {
  with_type(x_half, [&](auto x_type) {
    with_type(half, [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      layer_norm_backward((const X*)x, (const T*)grad, mean_grad,
                          (const X*)residual_grad, weight, eps, (X*)out,
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

// mean, gate: (b, C). squeeze: (S, C). excite: (C, S). hidden: (b, S).
void mmvvt_gate(const float* mean, const float* squeeze, const float* excite,
                float* hidden, float* gate, int64_t images, int64_t channels,
                int64_t size, int) {
  excitation_gate(mean, squeeze, excite, hidden, gate, images, channels, size);
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
