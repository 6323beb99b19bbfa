// Products of bfloat16 matrices, summed in float, by AVX-512's instruction for pairs: two numbers of each operand are
// multiplied and added at once. Such a pair is a word: neighbours in a row, or, of "paired" matrices, the numbers of
// two rows, one above the other.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using bf16 = std::uint16_t;
using word = std::uint32_t;
constexpr long kLanes = 16, kRows = 6, kVectors = 4;

inline long least(long a, long b) { return a < b ? a : b; }
inline long lanes(long count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline __m512 wide(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m256i narrow(__m512 x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  __m256i bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

inline void store(bf16* to, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x)); }

// Words of the numbers of two rows.
inline __m512i paired(__m256i upper, __m256i lower) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(upper), _mm512_slli_epi32(_mm512_cvtepu16_epi32(lower), 16));
}

// The left operand: the word of row m and pair k is at[m * row + k * pair].
struct Left {
  const word* at;
  long row, pair;
};

template <int M, int V>
void tile(Left a, const word* b, long b_step, float* c, long c_step, long pairs, bool add) {
  __m512 sums[M][V];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][v] = add ? _mm512_loadu_ps(c + m * c_step + v * kLanes) : _mm512_setzero_ps();
  for (long k = 0; k < pairs; ++k) {
    __m512bh right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + k * b_step + v * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      int pair;
      std::memcpy(&pair, a.at + m * a.row + k * a.pair, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], left, right[v]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + m * c_step + v * kLanes, sums[m][v]);
}

using Tile = void (*)(Left, const word*, long, float*, long, long, bool);
template <int M>
constexpr Tile kOfRows[kVectors] = {tile<M, 1>, tile<M, 2>, tile<M, 3>, tile<M, 4>};
constexpr const Tile* kTiles[kRows] = {kOfRows<1>, kOfRows<2>, kOfRows<3>, kOfRows<4>, kOfRows<5>, kOfRows<6>};

// c[rows, columns] = or += a[rows, 2 x pairs] @ b[2 x pairs, columns], columns a multiple of the lanes.
void multiply(Left a, const word* b, long b_step, float* c, long rows, long columns, long pairs, bool add) {
  for (long n = 0; n < columns; n += kVectors * kLanes) {
    const long vectors = least(kVectors, (columns - n) / kLanes);
    for (long m = 0; m < rows; m += kRows)
      kTiles[least(kRows, rows - m) - 1][vectors - 1]({a.at + m * a.row, a.row, a.pair}, b + n, b_step,
                                                      c + m * columns + n, columns, pairs, add);
  }
}

inline const word* words(const bf16* x) { return reinterpret_cast<const word*>(x); }

// to[width / 2, step]: the words of each row as a column; zeros behind the last.
void transpose(const bf16* from, long rows, long from_step, long width, word* to, long step) {
  for (long k = 0; k < width / 2; ++k) {
    for (long t = 0; t < rows; ++t) std::memcpy(to + k * step + t, from + t * from_step + 2 * k, sizeof(word));
    for (long t = rows; t < step; ++t) to[k * step + t] = 0;
  }
}

// to[ceil(filled / 2), width]: words of two rows each; zeros behind the last.
void pair(const bf16* from, long rows, long from_step, long width, word* to, long filled) {
  const __m256i none = _mm256_setzero_si256();
  for (long t = 0; t < filled; t += 2)
    for (long i = 0; i < width; i += kLanes) {
      const auto at = [&](long row) {
        return row < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + row * from_step + i)) : none;
      };
      _mm512_storeu_si512(to + t / 2 * width + i, paired(at(t), at(t + 1)));
    }
}

}  // namespace
