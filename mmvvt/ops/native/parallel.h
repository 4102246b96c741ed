// Threads, and sums over what they compute.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <omp.h>

namespace {

constexpr int BLOCK = 16;  // numbers that are added in sequence, see Sums

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

}  // namespace
