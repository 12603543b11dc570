// One pass over gradients: sums of squares, the largest, and a packed copy. See ops/grad_pack.py.
//
// Work is cut into blocks, each of one tensor, which threads take in turn. A block has a place of its own for
// its two results and its lanes are added up in a fixed order: no result depends on who takes which.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t BLOCK = 16384;
constexpr int64_t RUN = 16;  // blocks that a thread takes at a time
constexpr int LANES = 64;

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct Float32 {
  using Stored = float;
  static float load(float stored) { return stored; }
  static float store(float value) { return value; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static float load(uint16_t stored) { return as_float(uint32_t(stored) << 16); }
  static uint16_t store(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return value != value ? uint16_t(0x7FC0) : uint16_t(rounded);
  }
};

struct Float16 {
  using Stored = uint16_t;
  // The fields moved to where float32 has them are 2^112 too small; all ones in the exponent stay all ones.
  static float load(uint16_t stored) {
    const uint32_t size = uint32_t(stored & 0x7FFF) << 13;
    const uint32_t finite = as_bits(as_float(size) * 0x1p112f);
    const uint32_t bits = size >= 0x0F800000u ? (size | 0x7F800000u) : finite;
    return as_float(bits | (uint32_t(stored & 0x8000) << 16));
  }
};

struct Nothing {
  using Stored = float;
};

template <class Source, class Target, bool SCALED>
void sweep(const void* from, void* to, int64_t count, float scale, float* sum, float* top) {
  const auto* in = static_cast<const typename Source::Stored*>(from);
  auto* out = static_cast<typename Target::Stored*>(to);
  float sums[LANES] = {};
  uint32_t tops[LANES] = {};  // sizes as integers are in the same order, and NaN stands above infinity
  const auto take = [&](int64_t i, int lane) {
    float x = Source::load(in[i]);
    if (SCALED) x *= scale;
    sums[lane] += x * x;
    tops[lane] = std::max(tops[lane], as_bits(x) & 0x7FFFFFFFu);
    if constexpr (!std::is_same_v<Target, Nothing>) out[i] = Target::store(x);
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; lane++) take(i + lane, lane);
  for (int lane = 0; i < count; i++, lane++) take(i, lane);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) {
      sums[lane] += sums[lane + half];
      tops[lane] = std::max(tops[lane], tops[lane + half]);
    }
  *sum = sums[0];
  *top = as_float(tops[0]);
}

using Sweep = void (*)(const void*, void*, int64_t, float, float*, float*);

template <class Source>
Sweep chosen(int64_t target, bool scaled) {
  if (target == FLOAT32) return scaled ? sweep<Source, Float32, true> : sweep<Source, Float32, false>;
  if (target == BFLOAT16) return scaled ? sweep<Source, Bfloat16, true> : sweep<Source, Bfloat16, false>;
  return scaled ? sweep<Source, Nothing, true> : sweep<Source, Nothing, false>;
}

constexpr int64_t width(int64_t kind) { return kind == FLOAT32 ? 4 : 2; }

}  // namespace

// rows: [5, tensors], owner: [blocks], as `Table` has them; sums, tops: [blocks]. target_kind: -1 for none.
extern "C" void shoestring_grad_pack(const int64_t* rows, const int32_t* owner, int64_t tensors, int64_t blocks,
                                     float* sums, float* tops, char* target, int64_t target_kind, float scale,
                                     int32_t scaled, int64_t threads) {
  const int64_t *addresses = rows, *elements = rows + tensors, *places = rows + 2 * tensors,
                *first = rows + 3 * tensors, *kinds = rows + 4 * tensors;
  const Sweep sweeps[] = {chosen<Float32>(target_kind, scaled), chosen<Bfloat16>(target_kind, scaled),
                          chosen<Float16>(target_kind, scaled)};
  in_turns(blocks, RUN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t t = owner[b], start = (b - first[t]) * BLOCK;
      const auto* from = reinterpret_cast<const char*>(addresses[t]) + start * width(kinds[t]);
      char* to = target_kind < 0 ? nullptr : target + (places[t] + start) * width(target_kind);
      sweeps[kinds[t]](from, to, std::min(BLOCK, elements[t] - start), scale, sums + b, tops + b);
    }
  });
}
