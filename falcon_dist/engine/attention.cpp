// Causal attention inside packed segments, forward and backward, over bfloat16 with sums in float. A task is a few
// query heads that share a head of keys, in one segment; it goes through blocks of queries, each against the keys that
// it may see (FlashAttention-2, arXiv:2307.08691, without its blocks of keys). What a task computes is the same
// whatever the number of threads.

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <cmath>

#include "pairs.h"

extern "C" int omp_get_thread_num();  // of whichever library torch has loaded

namespace {

// Queries at once: their scores for 1000 keys stay in a cache of 1 MiB, and little is made beyond the diagonal.
constexpr long kBlock = 48;

// [B, heads, T, D] numbers of any layout whose innermost lie side by side; steps in numbers.
struct Heads {
  bf16* at;
  long row, head, token;
  bf16* of(long b, long h, long t) const { return at + b * row + h * head + t * token; }
};

// Norms [B, heads, T].
struct Norms {
  float* at;
  long row, head, token;
};

struct Span {
  long row, first, length;
};

// Cephes' expf, bounded so that the result is a normal number; what is not a number stays so.
inline __m512 exponential(__m512 x) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  x = _mm512_min_ps(all(88.0f), _mm512_max_ps(all(-87.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 8);
  const __m512 r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), _mm512_fnmadd_ps(n, all(0.693359375f), x));
  __m512 p = all(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, all(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, all(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, all(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, all(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, all(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), all(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __mmask16 before(long end, long at) {
  return end - at >= kLanes ? 0xffff : end <= at ? 0 : static_cast<__mmask16>((1u << (end - at)) - 1);
}

// Scores, which are overwritten, become probabilities of the keys that are seen, and zeros behind; the log-sum-exp.
float softmax(float* x, bf16* made, long seen, long keys, float scale) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (long i = 0; i < seen; i += kLanes) {
    const __mmask16 mask = before(seen, i);
    most = _mm512_mask_max_ps(most, mask, _mm512_loadu_ps(x + i), most);
  }
  const float top = _mm512_reduce_max_ps(most);
  for (long i = 0; i < keys; i += kLanes) {
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(top));
    const __m512 p = _mm512_maskz_mov_ps(before(seen, i), exponential(_mm512_mul_ps(below, _mm512_set1_ps(scale))));
    sum = _mm512_add_ps(sum, p);
    _mm512_storeu_ps(x + i, p);
  }
  const float whole = _mm512_reduce_add_ps(sum);
  const __m512 each = _mm512_set1_ps(1.0f / whole);
  for (long i = 0; i < keys; i += kLanes) store(made + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), each));
  return top * scale + std::log(whole);
}

// The scores of a query, the gradients of its probabilities, the log-sum-exp, and what the gradients have in common.
struct Row {
  const float *scores, *gradients;
  float norm, dot;
  long seen;

  // Of the 16 keys from i on: probabilities again, and the gradients of their products with the query.
  void at(long i, float scale, __m256i* weights, __m256i* made) const {
    const __m512 scaled = _mm512_set1_ps(scale);
    const __m512 p = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scaled, _mm512_set1_ps(norm)));
    const __m512 by = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(gradients + i), _mm512_set1_ps(dot)), scaled);
    *weights = narrow(_mm512_maskz_mov_ps(before(seen, i), p));
    *made = narrow(_mm512_maskz_mul_ps(before(seen, i), p, by));
  }
};

// Both as words of two rows, the gradients also row by row; behind the last row there is none.
void two_rows(const Row& upper, const Row& lower, long keys, float scale, bf16* by_rows, word* by_scores,
              word* weights) {
  for (long i = 0; i < keys; i += kLanes) {
    __m256i p[2] = {}, d[2] = {};
    upper.at(i, scale, p, d);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_rows + i), d[0]);
    if (lower.seen) {
      lower.at(i, scale, p + 1, d + 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_rows + keys + i), d[1]);
    }
    _mm512_storeu_si512(weights + i, paired(p[0], p[1]));
    _mm512_storeu_si512(by_scores + i, paired(d[0], d[1]));
  }
}

float dot(const bf16* a, const bf16* b, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long i = 0; i < width; i += kLanes) sum = _mm512_fmadd_ps(wide(a + i), wide(b + i), sum);
  return _mm512_reduce_add_ps(sum);
}

void narrow_rows(const float* from, long rows, long width, bf16* to, long to_step) {
  for (long t = 0; t < rows; ++t)
    for (long i = 0; i < width; i += kLanes) store(to + t * to_step + i, _mm512_loadu_ps(from + t * width + i));
}

// Hands out pieces of a thread's scratch, each on a line of the cache of its own.
struct Scratch {
  char* at;
  template <typename Kind>
  Kind* take(long count) {
    char* piece = at;
    at += (count * static_cast<long>(sizeof(Kind)) + 63) / 64 * 64;
    return reinterpret_cast<Kind*>(piece);
  }
};

struct Shape {
  long groups, sharing, parts, width;
  float scale;
};

// The heads of a part of those that share a head of keys.
inline long head_at(const Shape& shape, long group, long part) {
  return group * shape.sharing + shape.sharing * part / shape.parts;
}

void forward(const Shape& s, Span span, long group, long part, Heads q, Heads k, Heads v, Heads out, Norms norms,
             Scratch scratch) {
  const long T = span.length, T16 = lanes(T), D = s.width;
  word* keys = scratch.take<word>(D / 2 * T16);
  word* values = scratch.take<word>(T16 / 2 * D);
  float* scores = scratch.take<float>(kBlock * T16);
  bf16* weights = scratch.take<bf16>(kBlock * T16);
  float* made = scratch.take<float>(kBlock * D);
  transpose(k.of(span.row, group, span.first), T, k.token, D, keys, T16);
  pair(v.of(span.row, group, span.first), T, v.token, D, values, T16);
  for (long head = head_at(s, group, part); head < head_at(s, group, part + 1); ++head)
    for (long at = 0; at < T; at += kBlock) {
      const long rows = least(kBlock, T - at), seen = lanes(at + rows);
      const word* query = words(q.of(span.row, head, span.first + at));
      multiply({query, q.token / 2, 1}, keys, T16, scores, rows, seen, D / 2, false);
      float* norm = norms.at + span.row * norms.row + head * norms.head + (span.first + at) * norms.token;
      for (long r = 0; r < rows; ++r)
        norm[r * norms.token] = softmax(scores + r * seen, weights + r * seen, at + r + 1, seen, s.scale);
      multiply({words(weights), seen / 2, 1}, values, D, made, rows, D, seen / 2, false);
      narrow_rows(made, rows, D, out.of(span.row, head, span.first + at), out.token);
    }
}

struct Gradients {
  Heads grad, q, k, v, out, by_q;
  Norms norms;
};

// sums: [2, T, D], of the gradients of keys and of values over the part's heads.
void backward(const Shape& s, Span span, long group, long part, const Gradients& g, float* sums, Scratch scratch) {
  const long T = span.length, T16 = lanes(T), D = s.width, first = span.first, b = span.row;
  word *keys_across = scratch.take<word>(D / 2 * T16), *values_across = scratch.take<word>(D / 2 * T16);
  word *keys = scratch.take<word>(T16 / 2 * D), *queries = scratch.take<word>(kBlock / 2 * D);
  word *grads = scratch.take<word>(kBlock / 2 * D), *weights = scratch.take<word>(kBlock / 2 * T16);
  word* by_scores = scratch.take<word>(kBlock / 2 * T16);
  bf16* by_rows = scratch.take<bf16>(kBlock * T16);
  float *scores = scratch.take<float>(kBlock * T16), *by_weights = scratch.take<float>(kBlock * T16);
  float* made = scratch.take<float>(kBlock * D);
  transpose(g.k.of(b, group, first), T, g.k.token, D, keys_across, T16);
  transpose(g.v.of(b, group, first), T, g.v.token, D, values_across, T16);
  pair(g.k.of(b, group, first), T, g.k.token, D, keys, T16);
  std::memset(sums, 0, static_cast<std::size_t>(2 * T * D) * sizeof(float));
  for (long head = head_at(s, group, part); head < head_at(s, group, part + 1); ++head)
    for (long at = 0; at < T; at += kBlock) {
      const long rows = least(kBlock, T - at), sees = at + rows, seen = lanes(sees), pairs = (rows + 1) / 2;
      const bf16 *query = g.q.of(b, head, first + at), *grad = g.grad.of(b, head, first + at);
      const bf16* out = g.out.of(b, head, first + at);
      const float* norm = g.norms.at + b * g.norms.row + head * g.norms.head + (first + at) * g.norms.token;
      pair(query, rows, g.q.token, D, queries, rows);
      pair(grad, rows, g.grad.token, D, grads, rows);
      multiply({words(query), g.q.token / 2, 1}, keys_across, T16, scores, rows, seen, D / 2, false);
      multiply({words(grad), g.grad.token / 2, 1}, values_across, T16, by_weights, rows, seen, D / 2, false);
      const auto row = [&](long r) {
        return Row{scores + r * seen, by_weights + r * seen, norm[r * g.norms.token],
                   dot(grad + r * g.grad.token, out + r * g.out.token, D), at + r + 1};
      };
      for (long r = 0; r < rows; r += 2)
        two_rows(row(r), r + 1 < rows ? row(r + 1) : Row{}, seen, s.scale, by_rows + r * seen, by_scores + r / 2 * seen,
                 weights + r / 2 * seen);
      multiply({words(by_rows), seen / 2, 1}, keys, D, made, rows, D, seen / 2, false);
      narrow_rows(made, rows, D, g.by_q.of(b, head, first + at), g.by_q.token);
      multiply({by_scores, 1, seen}, queries, D, sums, sees, D, pairs, true);
      multiply({weights, 1, seen}, grads, D, sums + T * D, sees, D, pairs, true);
    }
}

inline Span span_at(const long* spans, long i) { return {spans[3 * i], spans[3 * i + 1], spans[3 * i + 2]}; }

inline Heads heads_at(const long* told, long i) {
  return {reinterpret_cast<bf16*>(told[4 * i]), told[4 * i + 1], told[4 * i + 2], told[4 * i + 3]};
}

inline Norms norms_at(const long* told) { return {reinterpret_cast<float*>(told[0]), told[1], told[2], told[3]}; }

}  // namespace

extern "C" {

// Bytes that a thread needs for segments up to this length.
long attention_scratch(long longest, long width) {
  const long across = lanes(longest) * width * 2, block = kBlock * lanes(longest);
  return 3 * across + kBlock * width * 8 + block * 14 + 16 * 64;
}

// spans: [count, 3], row, first token and length of each segment. heads: place and steps of query, key, value and out,
// [4, 4], norms: of the log-sum-exps. sizes: heads of keys, heads that share one, parts of these, width.
void attend(const long* spans, long count, const long* heads, const long* norms, const long* sizes, float scale,
            char* scratch, long scratch_step, int threads) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], scale};
  const long tasks = s.groups * s.parts;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long i = 0; i < count * tasks; ++i)
    forward(s, span_at(spans, i / tasks), i % tasks / s.parts, i % s.parts, heads_at(heads, 0), heads_at(heads, 1),
            heads_at(heads, 2), heads_at(heads, 3), norms_at(norms),
            Scratch{scratch + omp_get_thread_num() * scratch_step});
}

// heads: of grad, query, key, value, out and the gradients of query, key and value. sums: for each segment
// [groups x parts, 2, length, width].
void attend_backward(const long* spans, long count, const long* heads, const long* norms, const long* sizes,
                     float scale, float* sums, char* scratch, long scratch_step, int threads) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], scale};
  const Gradients g{heads_at(heads, 0), heads_at(heads, 1), heads_at(heads, 2), heads_at(heads, 3),
                    heads_at(heads, 4), heads_at(heads, 5), norms_at(norms)};
  const long tasks = s.groups * s.parts;
  const auto sum_at = [&](long span, long task) {
    long before = 0;
    for (long i = 0; i < span; ++i) before += spans[3 * i + 2];
    return sums + 2 * s.width * (before * tasks + spans[3 * span + 2] * task);
  };
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long i = 0; i < count * tasks; ++i)
    backward(s, span_at(spans, i / tasks), i % tasks / s.parts, i % s.parts, g, sum_at(i / tasks, i % tasks),
             Scratch{scratch + omp_get_thread_num() * scratch_step});
  const Heads made[2] = {heads_at(heads, 6), heads_at(heads, 7)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < count * s.groups; ++i) {
    const Span span = span_at(spans, i / s.groups);
    const long each = 2 * span.length * s.width;
    float* whole = sum_at(i / s.groups, i % s.groups * s.parts);
    for (long part = 1; part < s.parts; ++part)
#pragma omp simd
      for (long x = 0; x < each; ++x) whole[x] += whole[part * each + x];
    for (int which = 0; which < 2; ++which)
      narrow_rows(whole + which * each / 2, span.length, s.width, made[which].of(span.row, i % s.groups, span.first),
                  made[which].token);
  }
}

}  // extern "C"
#endif
