#include "kernels.h"

#include <algorithm>
#include <cstring>

namespace falcon {

namespace {

constexpr size_t kBlock = 1024;  // elements accumulated at a time: 4 KiB of stack, in the first cache

struct Loops {
  void (*load)(const uint16_t* from, float* to, size_t count);
  void (*store)(const float* from, uint16_t* to, size_t count);
  void (*add)(float* sum, const float* from, size_t count);
  void (*multiply)(float* sum, const float* from, size_t count);
  void (*least)(float* sum, const float* from, size_t count);
  void (*most)(float* sum, const float* from, size_t count);
  void (*add_two_half)(
      const uint16_t* a, const uint16_t* b, float scale, uint16_t* result, uint16_t* shared, size_t count);
  void (*add_two)(const float* a, const float* b, float scale, float* result, float* shared, size_t count);
  void (*divide)(float* sum, float divisor, size_t count);
};

// One build serves every x86-64. By hand, because target_clones takes no lists of features, takes levels
// ("arch=x86-64-v4") from g++ 12 on only, and with avx512f alone a sum of bfloat16 takes half as long again.
namespace plain {
#define FALCON_TARGET
#include "loops.inc"
#undef FALCON_TARGET
}  // namespace plain

namespace avx2 {
#define FALCON_TARGET __attribute__((target("avx2,fma,bmi,bmi2")))
#include "loops.inc"
#undef FALCON_TARGET
}  // namespace avx2

namespace avx512 {
#define FALCON_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#include "loops.inc"
#undef FALCON_TARGET
}  // namespace avx512

// The widest that this cpu has.
const Loops& loops() {
  static const Loops& chosen = []() -> const Loops& {
    const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool full = half && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return full ? avx512::kLoops : half ? avx2::kLoops : plain::kLoops;
  }();
  return chosen;
}

void fold_into(Fold operation, float* sum, const float* from, size_t count) {
  switch (operation) {
    case Fold::kSum:
    case Fold::kAverage:
      return loops().add(sum, from, count);
    case Fold::kProduct:
      return loops().multiply(sum, from, count);
    case Fold::kMin:
      return loops().least(sum, from, count);
    case Fold::kMax:
      return loops().most(sum, from, count);
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
    if (half) {
      return loops().add_two_half(
          as<const uint16_t>(inputs[0]), as<const uint16_t>(inputs[1]), scale, as<uint16_t>(result),
          as<uint16_t>(shared), count);
    }
    return loops().add_two(
        as<const float>(inputs[0]), as<const float>(inputs[1]), scale, as<float>(result), as<float>(shared), count);
  }
  const size_t width = bytes_of(element);
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t here = std::min(kBlock, count - start);
    const size_t offset = start * width;
    for (int rank = 0; rank < ranks; ++rank) {
      float* const into = rank == 0 ? sum : wide;
      if (half) {
        loops().load(as<const uint16_t>(inputs[rank] + offset), into, here);
      } else if (rank == 0) {
        std::memcpy(sum, inputs[0] + offset, here * width);
      }
      if (rank > 0) {
        const auto* direct = reinterpret_cast<const float*>(inputs[rank] + offset);
        fold_into(operation, sum, half ? wide : direct, here);
      }
    }
    if (operation == Fold::kAverage) {
      loops().divide(sum, static_cast<float>(ranks), here);
    }
    const void* from = sum;
    if (half) {
      loops().store(sum, low, here);
      from = low;
    }
    std::memcpy(result + offset, from, here * width);
    std::memcpy(shared + offset, from, here * width);
  }
}

}  // namespace falcon
