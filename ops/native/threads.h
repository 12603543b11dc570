// Work in several threads: PyTorch's own where the library was built for its OpenMP runtime, since those of a
// second pool would wait for cores on which PyTorch's spin.

#pragma once

#include <atomic>
#include <cstdint>
#ifndef _OPENMP
#include <system_error>
#include <thread>
#include <vector>
#endif

// work(first, end) for runs of [0, count), in any order; each thread takes the next one.
template <class Work>
void in_turns(int64_t count, int64_t run, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t first; (first = next.fetch_add(run)) < count;) work(first, first + run < count ? first + run : count);
  };
  const int64_t runs = (count + run - 1) / run;
  if (threads > runs) threads = runs;
  if (threads <= 1) return take();
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
  take();
#else
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < threads; t++) others.emplace_back(take);
  } catch (const std::system_error&) {  // no more threads for this user: those that started do it all
  }
  take();
  for (auto& thread : others) thread.join();
#endif
}
