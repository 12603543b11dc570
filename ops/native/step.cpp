// One pass of an optimizer over many tensors: decode the moments, update, encode them, write the weights.
// What each number means is said in ops/quantised_step.py, ops/codec.py and ops/rounding.py.
//
// Work is cut into runs of whole blocks, which threads take in turn: no result depends on who takes which.
// Each block of 256 elements goes through small arrays on the stack, by loops that compilers turn into vectors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

constexpr int BLOCK = 256;           // elements at a time; scales of four bits are of half of it
constexpr int RUN = 64;              // blocks that a thread takes at a time
constexpr int64_t PERIOD = 1 << 18;  // of the random bits

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };
enum Kind : int32_t { WIDE = 0, NARROW = 1, COMPANDED = 2, LINEAR = 3, DYNAMIC = 4, FOUR = 5 };
enum Mode : int32_t { IN_PLACE = 0, SR = 1, KAHAN = 2, MASTER = 3, PLAIN = 4 };
enum Rule : int32_t { ADAMW = 0, LION = 1, DIRECTION = 2, WRITE = 3 };

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

inline float widened(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

inline uint16_t nearest(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? uint16_t(0x7FC0) : uint16_t(rounded);
}

inline uint16_t dithered(float value, uint32_t noise) {
  const uint32_t bits = as_bits(value);
  return value != value ? uint16_t(0x7FC0) : uint16_t((bits + noise) >> 16);
}

inline float to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// ops/rounding.py: noise_tile(key)[place % PERIOD]
inline uint32_t noise_at(uint32_t place, uint32_t key) {
  uint32_t x = (place & (PERIOD - 1)) * 0x9E3779B1u + key;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return (x ^ (x >> 16)) >> 16;
}

void load(float* out, const void* from, int32_t type, int64_t first, int n) {
  if (type == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(from) + first, n * sizeof(float));
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(from) + first;
    for (int i = 0; i < n; i++) out[i] = widened(bits[i]);
  }
}

// The scale of a run of codes: its largest size, or NaN where something is not a number (whose bits are larger).
float largest(const float* x, int n) {
  uint32_t top = 0;
  for (int i = 0; i < n; i++) {
    const uint32_t bits = as_bits(x[i]) & 0x7FFFFFFFu;
    top = bits > top ? bits : top;
  }
  return as_float(top);
}

struct Tables {
  const float* of_signed;
  const float* of_unsigned;
};

template <int KIND, bool SIGNED>
void decode(float* out, const void* codes, const float* scales, const Tables& tables, int64_t first, int n) {
  if (KIND == WIDE || KIND == NARROW) {
    load(out, codes, KIND == WIDE ? FLOAT32 : BFLOAT16, first, n);
    return;
  }
  if (KIND == FOUR) {
    const uint8_t* pairs = static_cast<const uint8_t*>(codes) + first / 2;
    for (int i = 0; i < (n + 1) / 2; i++) {
      const int low = pairs[i] & 15, high = pairs[i] >> 4;
      out[2 * i] = float(SIGNED ? (low ^ 8) - 8 : low);
      out[2 * i + 1] = float(SIGNED ? (high ^ 8) - 8 : high);
    }
    for (int half = 0; half < n; half += 128) {
      const float scale = scales[(first + half) / 128];
      for (int i = half; i < (half + 128 < n ? half + 128 : n); i++) {
        const float c = out[i];
        const float share = SIGNED ? c * std::fabs(c) * (1.0f / 49) : c * (1.0f / 15) * (c * (1.0f / 15));
        out[i] = (SIGNED ? share : share * share) * scale;
      }
    }
    return;
  }
  const float scale = scales[first / BLOCK];
  if (KIND == DYNAMIC) {
    const uint8_t* code = static_cast<const uint8_t*>(codes) + first;
    const float* table = SIGNED ? tables.of_signed : tables.of_unsigned;
    for (int i = 0; i < n; i++) out[i] = table[code[i]] * scale;
  } else if (SIGNED) {
    const int8_t* code = static_cast<const int8_t*>(codes) + first;
    for (int i = 0; i < n; i++) {
      const float c = float(code[i]);
      out[i] = (KIND == LINEAR ? c * (1.0f / 127) : c * std::fabs(c) * (1.0f / 16129)) * scale;
    }
  } else {
    const uint8_t* code = static_cast<const uint8_t*>(codes) + first;
    for (int i = 0; i < n; i++) {
      const float c = float(code[i]) * (1.0f / 255);
      out[i] = (KIND == LINEAR ? c * c : (c * c) * (c * c)) * scale;
    }
  }
}

// Index into the ascending table that stands for each share, all elements by one halving after the other.
template <bool SIGNED>
void search(int32_t* low, const float* share, const float* table, float threshold, int n) {
  for (int i = 0; i < n; i++) low[i] = 0;
  for (int step = 128; step; step >>= 1) {
    for (int i = 0; i < n; i++) {
      const int32_t ahead = low[i] + step;
      const float edge = SIGNED ? (table[ahead] + table[ahead - 1]) * 0.5f : table[ahead];
      low[i] = (SIGNED ? share[i] > edge : share[i] >= edge) ? ahead : low[i];
    }
  }
  if (SIGNED) return;
  for (int i = 0; i < n; i++) {
    const int32_t below = low[i] < 254 ? low[i] : 254;
    const float part = (share[i] - table[below]) / (table[below + 1] - table[below]);
    const int32_t code = below + (part + threshold >= 1.0f ? 1 : 0);
    low[i] = code < 1 ? 1 : code;
  }
}

template <int KIND, bool SIGNED>
void encode(const float* x, void* codes, float* scales, const Tables& tables, float threshold, int64_t first, int n) {
  if (KIND == WIDE) {
    std::memcpy(static_cast<float*>(codes) + first, x, n * sizeof(float));
    return;
  }
  if (KIND == NARROW) {
    uint16_t* bits = static_cast<uint16_t*>(codes) + first;
    for (int i = 0; i < n; i++) bits[i] = nearest(x[i]);
    return;
  }
  constexpr int width = KIND == FOUR ? 128 : BLOCK;
  constexpr float top = KIND == FOUR ? (SIGNED ? 7.0f : 15.0f) : (SIGNED ? 127.0f : 255.0f);
  for (int part = 0; part < n; part += width) {
    const int count = n - part < width ? n - part : width;
    const float* value = x + part;
    const float scale = largest(value, count);
    scales[(first + part) / width] = scale;
    const float inverse = 1.0f / (scale > 1.2e-38f || scale != scale ? scale : 1.2e-38f);
    int32_t code[width];
    if (KIND == DYNAMIC) {
      float share[width];
      for (int i = 0; i < count; i++) share[i] = value[i] * inverse;
      search<SIGNED>(code, share, SIGNED ? tables.of_signed : tables.of_unsigned, threshold, count);
    } else if (SIGNED) {
      for (int i = 0; i < count; i++) {
        const float share = std::fabs(value[i] * inverse);
        const float size = to_even((KIND == LINEAR ? share : std::sqrt(share)) * top);
        code[i] = int32_t(std::copysign(size == size ? size : 0.0f, value[i]));  // no integer is NaN
      }
    } else {
      for (int i = 0; i < count; i++) {
        const float share = std::sqrt(value[i] * inverse);
        const float cut = (KIND == LINEAR ? share : std::sqrt(share)) * top + threshold;
        const int32_t whole = int32_t(cut == cut ? cut : 0.0f);
        code[i] = whole < 1 ? 1 : whole > int32_t(top) ? int32_t(top) : whole;
      }
    }
    if (KIND == FOUR) {
      uint8_t* pairs = static_cast<uint8_t*>(codes) + (first + part) / 2;
      if (count % 2) code[count] = 0;
      for (int i = 0; i < (count + 1) / 2; i++) pairs[i] = uint8_t((code[2 * i] & 15) | (code[2 * i + 1] & 15) << 4);
    } else {
      uint8_t* bytes = static_cast<uint8_t*>(codes) + first + part;
      for (int i = 0; i < count; i++) bytes[i] = uint8_t(code[i]);
    }
  }
}

}  // namespace

extern "C" {

struct Job {
  void* weight;  // of DIRECTION: the values, overwritten
  const void* grad;
  void* first;
  float* first_scales;
  void* second;
  float* second_scales;
  void* extra;  // master or compensation
  int64_t elements;
  int64_t start;  // place of element 0 among the random bits
};

struct Settings {
  int32_t rule, kind, mode, weight_type, grad_type, threads;
  float decay, beta1, beta2, gain1, gain2, eps, rate, root_correction, threshold, grad_scale;
  uint32_t key;
  const float* signed_table;
  const float* unsigned_table;
};
}

namespace {

// weight <- weight - decay * weight + update, as ops/writing.py's add_step. One factor for the weight would be
// rounded to a multiple of 6e-8, which a decay may be below.
void write(const Job& job, const Settings& s, float* update, int64_t first, int n) {
  const float decay = s.decay;
  const auto kept = [decay](float w) { return decay != 0 ? w - decay * w : w; };
  if (s.mode == IN_PLACE) {
    float* w = static_cast<float*>(job.weight) + first;
    for (int i = 0; i < n; i++) w[i] = kept(w[i]) + update[i];
    return;
  }
  uint16_t* w = static_cast<uint16_t*>(job.weight) + first;
  const uint32_t start = uint32_t((job.start + first) & (PERIOD - 1));
  if (s.mode == MASTER) {
    float* master = static_cast<float*>(job.extra) + first;
    for (int i = 0; i < n; i++) {
      master[i] = kept(master[i]) + update[i];
      w[i] = nearest(master[i]);
    }
  } else if (s.mode == KAHAN) {
    uint16_t* lost = static_cast<uint16_t*>(job.extra) + first;
    for (int i = 0; i < n; i++) {
      const float old = widened(w[i]);
      const float wanted = widened(lost[i]) - decay * old + update[i];
      const uint16_t moved = nearest(old + wanted);
      lost[i] = dithered(wanted - (widened(moved) - old), noise_at(start + i, s.key));
      w[i] = moved;
    }
  } else if (s.mode == SR) {
    for (int i = 0; i < n; i++) w[i] = dithered(kept(widened(w[i])) + update[i], noise_at(start + i, s.key));
  } else {
    for (int i = 0; i < n; i++) w[i] = nearest(kept(widened(w[i])) + update[i]);
  }
}

template <int KIND>
void advance(const Job& job, const Settings& s, int64_t first, int n) {
  const Tables tables{s.signed_table, s.unsigned_table};
  float g[BLOCK], m[BLOCK + 1], v[BLOCK + 1];
  load(g, job.grad, s.grad_type, first, n);
  if (s.grad_scale != 1.0f)
    for (int i = 0; i < n; i++) g[i] *= s.grad_scale;
  decode<KIND, true>(m, job.first, job.first_scales, tables, first, n);
  if (s.rule == LION) {
    float update[BLOCK];
    for (int i = 0; i < n; i++) {
      const float c = s.beta1 * m[i] + s.gain1 * g[i];
      update[i] = -s.rate * (c > 0 ? 1.0f : c < 0 ? -1.0f : c);
      m[i] = s.beta2 * m[i] + s.gain2 * g[i];
    }
    encode<KIND, true>(m, job.first, job.first_scales, tables, 0, first, n);
    write(job, s, update, first, n);
    return;
  }
  decode<KIND, false>(v, job.second, job.second_scales, tables, first, n);
  float update[BLOCK];
  for (int i = 0; i < n; i++) {
    m[i] += s.gain1 * (g[i] - m[i]);
    v[i] = s.beta2 * v[i] + s.gain2 * (g[i] * g[i]);
    update[i] = -s.rate * (m[i] / (std::sqrt(v[i]) * s.root_correction + s.eps));
  }
  encode<KIND, true>(m, job.first, job.first_scales, tables, 0, first, n);
  encode<KIND, false>(v, job.second, job.second_scales, tables, s.threshold, first, n);
  if (s.rule == DIRECTION) {
    std::memcpy(static_cast<float*>(job.weight) + first, update, n * sizeof(float));
  } else {
    write(job, s, update, first, n);
  }
}

void one(const Job& job, const Settings& s, int64_t first, int n) {
  if (s.rule == WRITE) {  // the gradient is the update itself
    float update[BLOCK];
    load(update, job.grad, s.grad_type, first, n);
    return write(job, s, update, first, n);
  }
  switch (s.kind) {
    case WIDE: return advance<WIDE>(job, s, first, n);
    case NARROW: return advance<NARROW>(job, s, first, n);
    case COMPANDED: return advance<COMPANDED>(job, s, first, n);
    case LINEAR: return advance<LINEAR>(job, s, first, n);
    case DYNAMIC: return advance<DYNAMIC>(job, s, first, n);
    default: return advance<FOUR>(job, s, first, n);
  }
}

}  // namespace

extern "C" void shoestring_step(const Job* jobs, int64_t count, const Settings* settings) {
  constexpr int64_t size = int64_t(RUN) * BLOCK;
  std::vector<int64_t> before(count + 1, 0);  // runs in the tensors before each
  for (int64_t j = 0; j < count; j++) before[j + 1] = before[j] + (jobs[j].elements + size - 1) / size;
  in_turns(before[count], 1, settings->threads, [&](int64_t run, int64_t) {
    const int64_t j = std::upper_bound(before.begin(), before.end(), run) - before.begin() - 1;
    const int64_t from = (run - before[j]) * size;
    const int64_t to = from + size < jobs[j].elements ? from + size : jobs[j].elements;
    for (int64_t first = from; first < to; first += BLOCK)
      one(jobs[j], *settings, first, to - first < BLOCK ? int(to - first) : BLOCK);
  });
}
