// Sums and their kin over float32 and bfloat16 arrays, accumulated in float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace falcon {

enum class Fold { kSum, kAverage, kProduct, kMin, kMax };
enum class Element { kFloat32, kBfloat16 };

constexpr size_t bytes_of(Element element) {
  return element == Element::kFloat32 ? 4 : 2;
}

// results[i] = shared[i] = fold of inputs[0][i] ... inputs[ranks - 1][i], in that order, rounded once at the
// end. `result` and `shared` may be among the inputs.
void fold(
    Element element,
    Fold operation,
    const char* const* inputs,
    int ranks,
    char* result,
    char* shared,
    size_t count);

}  // namespace falcon
