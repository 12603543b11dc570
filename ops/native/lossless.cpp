// bfloat16 in about 11 bits, without loss. The layout and what each number means are in ops/lossless.py.
//
// Element i * STRIDE + j of a block has its code in bit i of byte j of the three planes, so that whole vectors
// of neighbours are put together with shifts alone.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t BLOCK = 4096;
constexpr int64_t STRIDE = BLOCK / 8;
constexpr int64_t PLANES = 3 * STRIDE;  // bytes
constexpr int64_t RUN = 32;             // blocks that a thread takes at a time
constexpr int WINDOW = 7;

template <class Work>
void each_block(int64_t elements, int64_t threads, const Work& work) {
  in_turns((elements + BLOCK - 1) / BLOCK, RUN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) work(b);
  });
}

// The start of the seven neighbouring exponents that most elements have.
uint8_t best_window(const uint16_t* in, int64_t count) {
  uint32_t counts[4][256] = {};
  for (int64_t i = 0; i < count; i++) counts[i & 3][(in[i] >> 7) & 255]++;
  uint32_t all[256], inside = 0, best = 0;
  int chosen = 0;
  for (int e = 0; e < 256; e++) all[e] = counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
  for (int e = 0; e < 256; e++) {
    inside += all[e];
    if (e >= WINDOW) inside -= all[e - WINDOW];
    if (e >= WINDOW - 1 && inside > best) best = inside, chosen = e - WINDOW + 1;
  }
  return uint8_t(chosen);
}

void encode_block(const uint16_t* in, int64_t count, uint8_t* base, uint16_t* others, uint8_t* low, uint8_t* planes,
                  uint8_t* rest) {
  uint8_t codes[BLOCK] = {}, exponents[BLOCK];
  const uint8_t first = *base = best_window(in, count);
  for (int64_t i = 0; i < count; i++) {
    low[i] = uint8_t((in[i] >> 8 & 0x80) | (in[i] & 0x7F));
    exponents[i] = uint8_t(in[i] >> 7);
    const uint8_t code = uint8_t(exponents[i] - first);
    codes[i] = std::min<uint8_t>(code, WINDOW);
  }
  std::memset(planes, 0, PLANES);
  for (int64_t i = 0; i < 8; i++)
    for (int64_t j = 0; j < STRIDE; j++) {
      const uint8_t code = codes[i * STRIDE + j];
      planes[j] |= uint8_t((code & 1) << i);
      planes[STRIDE + j] |= uint8_t((code >> 1 & 1) << i);
      planes[2 * STRIDE + j] |= uint8_t((code >> 2) << i);
    }
  uint16_t found = 0;
  for (int64_t j = 0; j < STRIDE; j++)
    if (planes[j] & planes[STRIDE + j] & planes[2 * STRIDE + j])
      for (int64_t i = 0; i < 8; i++)
        if (codes[i * STRIDE + j] == WINDOW) rest[found++] = exponents[i * STRIDE + j];
  *others = found;
}

// False where the planes do not name as many others as there are.
bool decode_block(uint16_t* out, int64_t count, uint8_t base, uint16_t others, const uint8_t* low,
                  const uint8_t* planes, const uint8_t* rest) {
  const uint16_t first = uint16_t(base) << 7;
  for (int64_t i = 0; i < 8 && i * STRIDE < count; i++) {
    const int64_t end = std::min(STRIDE, count - i * STRIDE);
    const uint8_t *a = planes, *b = planes + STRIDE, *c = planes + 2 * STRIDE, *at = low + i * STRIDE;
    uint16_t* to = out + i * STRIDE;
    for (int64_t j = 0; j < end; j++) {
      const uint16_t code = uint16_t((a[j] >> i & 1) | (b[j] >> i & 1) << 1 | (c[j] >> i & 1) << 2);
      to[j] = uint16_t((at[j] & 0x80) << 8 | (at[j] & 0x7F) | (first + (code << 7)));
    }
  }
  uint16_t found = 0;
  for (int64_t j = 0; j < STRIDE; j += 8) {
    uint64_t a, b, c;
    std::memcpy(&a, planes + j, 8);
    std::memcpy(&b, planes + STRIDE + j, 8);
    std::memcpy(&c, planes + 2 * STRIDE + j, 8);
    for (uint64_t set = a & b & c; set; set &= set - 1) {
      const int bit = __builtin_ctzll(set);
      const int64_t i = (bit & 7) * STRIDE + j + (bit >> 3);
      if (found == others || i >= count) return false;
      out[i] = uint16_t((low[i] & 0x80) << 8 | (low[i] & 0x7F) | rest[found++] << 7);
    }
  }
  return found == others;
}

}  // namespace

// rest: room for `elements` bytes, of which the first so many as it returns are what there is.
extern "C" int64_t shoestring_lossless_encode(const uint16_t* in, int64_t elements, uint8_t* bases, uint16_t* others,
                                           uint8_t* low, uint8_t* planes, uint8_t* rest, int64_t threads) {
  each_block(elements, threads, [&](int64_t b) {
    const int64_t start = b * BLOCK;
    encode_block(in + start, std::min(BLOCK, elements - start), bases + b, others + b, low + start,
                 planes + b * PLANES, rest + start);
  });
  int64_t end = 0;
  for (int64_t b = 0; b * BLOCK < elements; end += others[b++]) std::memmove(rest + end, rest + b * BLOCK, others[b]);
  return end;
}

// starts: [blocks], where in `rest` each block's begin. Returns the number of blocks that contradict themselves.
extern "C" int64_t shoestring_lossless_decode(uint16_t* out, int64_t elements, const uint8_t* bases,
                                              const uint16_t* others, const int64_t* starts, const uint8_t* low,
                                              const uint8_t* planes, const uint8_t* rest, int64_t threads) {
  std::atomic<int64_t> wrong{0};
  each_block(elements, threads, [&](int64_t b) {
    const int64_t start = b * BLOCK;
    if (!decode_block(out + start, std::min(BLOCK, elements - start), bases[b], others[b], low + start,
                      planes + b * PLANES, rest + starts[b]))
      wrong++;
  });
  return wrong;
}
