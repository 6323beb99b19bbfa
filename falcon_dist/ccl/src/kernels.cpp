#include "kernels.h"

#include <algorithm>
#include <cstring>

// One build serves every x86-64: the loader picks the widest version that the cpu has.
#define FALCON_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace falcon {

namespace {

constexpr size_t kBlock = 1024;  // elements accumulated at a time: 4 KiB of stack, in the first cache

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// To nearest, ties to even; a NaN stays a quiet NaN.
inline uint16_t narrow(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? (word >> 16) | 0x40u : rounded);
}

FALCON_CLONES void load(const uint16_t* from, float* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    to[i] = widen(from[i]);
  }
}

FALCON_CLONES void store(const float* from, uint16_t* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    to[i] = narrow(from[i]);
  }
}

#define FALCON_FOLD(name, expression)                                                          \
  FALCON_CLONES void name(float* __restrict sum, const float* __restrict from, size_t count) { \
    for (size_t i = 0; i < count; ++i) {                                                       \
      const float a = sum[i], b = from[i];                                                     \
      sum[i] = expression;                                                                     \
    }                                                                                          \
  }

FALCON_FOLD(add, a + b)
FALCON_FOLD(multiply, a* b)
// A NaN on either side is the result, as torch.minimum has it.
FALCON_FOLD(least, a != a ? a : (b < a || b != b ? b : a))
FALCON_FOLD(most, a != a ? a : (b > a || b != b ? b : a))

// The sum or the mean of two arrays in one pass: nothing is held between.
FALCON_CLONES void add_two(
    const uint16_t* a, const uint16_t* b, float scale, uint16_t* result, uint16_t* shared, size_t count) {
#pragma GCC ivdep  // an output may be an input itself, but never shifted against it
  for (size_t i = 0; i < count; ++i) {
    const uint16_t low = narrow((widen(a[i]) + widen(b[i])) * scale);
    result[i] = low;
    shared[i] = low;
  }
}

FALCON_CLONES void add_two(const float* a, const float* b, float scale, float* result, float* shared, size_t count) {
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) {
    const float sum = (a[i] + b[i]) * scale;
    result[i] = sum;
    shared[i] = sum;
  }
}

FALCON_CLONES void divide(float* sum, float divisor, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    sum[i] /= divisor;
  }
}

void fold_into(Fold operation, float* sum, const float* from, size_t count) {
  switch (operation) {
    case Fold::kSum:
    case Fold::kAverage:
      return add(sum, from, count);
    case Fold::kProduct:
      return multiply(sum, from, count);
    case Fold::kMin:
      return least(sum, from, count);
    case Fold::kMax:
      return most(sum, from, count);
  }
}

template <typename T, typename Bytes>
T* as(Bytes* bytes) {
  return reinterpret_cast<T*>(bytes);
}

}  // namespace

void fold(
    Element element,
    Fold operation,
    const char* const* inputs,
    int ranks,
    char* result,
    char* shared,
    size_t count) {
  alignas(64) float sum[kBlock];
  alignas(64) float wide[kBlock];
  alignas(64) uint16_t low[kBlock];
  const bool half = element == Element::kBfloat16;
  if (ranks == 2 && (operation == Fold::kSum || operation == Fold::kAverage)) {
    const float scale = operation == Fold::kAverage ? 0.5f : 1.0f;
    return half ? add_two(as<const uint16_t>(inputs[0]), as<const uint16_t>(inputs[1]), scale, as<uint16_t>(result),
                          as<uint16_t>(shared), count)
                : add_two(as<const float>(inputs[0]), as<const float>(inputs[1]), scale, as<float>(result),
                          as<float>(shared), count);
  }
  const size_t width = bytes_of(element);
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t here = std::min(kBlock, count - start);
    const size_t offset = start * width;
    for (int rank = 0; rank < ranks; ++rank) {
      float* const into = rank == 0 ? sum : wide;
      if (half) {
        load(as<const uint16_t>(inputs[rank] + offset), into, here);
      } else if (rank == 0) {
        std::memcpy(sum, inputs[0] + offset, here * width);
      }
      if (rank > 0) {
        const auto* direct = reinterpret_cast<const float*>(inputs[rank] + offset);
        fold_into(operation, sum, half ? wide : direct, here);
      }
    }
    if (operation == Fold::kAverage) {
      divide(sum, static_cast<float>(ranks), here);
    }
    const void* from = sum;
    if (half) {
      store(sum, low, here);
      from = low;
    }
    std::memcpy(result + offset, from, here * width);
    std::memcpy(shared + offset, from, here * width);
  }
}

}  // namespace falcon
