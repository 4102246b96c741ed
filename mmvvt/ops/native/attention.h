// The attention of a strip: sums of the products of keys and values, and the
// products of these sums with the queries.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int ROWS = 8;  // rows of a product that stay in registers
#else
constexpr int ROWS = 4;
#endif
constexpr int CHUNK = 32;  // tokens of which the features fit into the L1 cache

inline int64_t round_up(int64_t number, int64_t step) {
  return (number + step - 1) / step * step;
}
inline int64_t whole_vectors(int64_t size) { return round_up(size, WIDTH); }
inline int64_t whole_rows(int64_t count) { return round_up(count, ROWS); }

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
