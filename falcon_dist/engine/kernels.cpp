// Elementwise passes of a training step over bfloat16, each in one go; arithmetic in float, rounded once.
// Compiled for the processor at hand by kernels.py, called through ctypes; loops are such as g++ vectorises.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = std::uint16_t;
constexpr long kPiece = 4096;

inline float wide(bf16 x) {
  std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float made;
  std::memcpy(&made, &bits, 4);
  return made;
}

// To nearest, ties to even; what is not a number stays so.
inline bf16 narrow(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Cephes' expf, within 2 units in the last place; bounded so that the result is a normal number.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = std::rint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float wide(float x) { return x; }

inline long least(long a, long b) { return a < b ? a : b; }

// sums: [ceil(count / kPiece)], each of the squares of a piece; whatever the threads are, the pieces are the same.
template <typename Number>
void square_sums(const Number* x, double* sums, long count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long at = 0; at < count; at += kPiece) {
    const long end = least(at + kPiece, count);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = at; i < end; ++i) sum += wide(x[i]) * wide(x[i]);
    sums[at / kPiece] = sum;
  }
}

}  // namespace

extern "C" {

void square_sums_of_bf16(const bf16* x, double* sums, long count, int threads) {
  square_sums(x, sums, count, threads);
}

void square_sums_of_float(const float* x, double* sums, long count, int threads) {
  square_sums(x, sums, count, threads);
}

// out = gate * sigmoid(gate) * up
void swiglu(const bf16* gate, const bf16* up, bf16* out, long count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long at = 0; at < count; at += kPiece) {
    const long end = least(at + kPiece, count);
#pragma omp simd
    for (long i = at; i < end; ++i) {
      const float g = wide(gate[i]);
      out[i] = narrow(g / (1.0f + exponential(-g)) * wide(up[i]));
    }
  }
}

void swiglu_backward(const bf16* grad, const bf16* gate, const bf16* up, bf16* of_gate, bf16* of_up, long count,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long at = 0; at < count; at += kPiece) {
    const long end = least(at + kPiece, count);
#pragma omp simd
    for (long i = at; i < end; ++i) {
      const float g = wide(gate[i]), d = wide(grad[i]), s = 1.0f / (1.0f + exponential(-g));
      of_up[i] = narrow(d * g * s);
      of_gate[i] = narrow(d * wide(up[i]) * s * (1.0f + g * (1.0f - s)));
    }
  }
}

// out = weight * x * scale, scale[row] = 1 / sqrt(mean(x^2) + eps)
void rms(const bf16* x, const bf16* weight, bf16* out, float* scale, long rows, long width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; ++row) {
    const bf16* in = x + row * width;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; ++i) sum += wide(in[i]) * wide(in[i]);
    const float s = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
    scale[row] = s;
    bf16* made = out + row * width;
#pragma omp simd
    for (long i = 0; i < width; ++i) made[i] = narrow(wide(weight[i]) * (wide(in[i]) * s));
  }
}

// of_weight: [threads, width], zeros; each thread sums its rows.
void rms_backward(const bf16* grad, const bf16* x, const bf16* weight, const float* scale, bf16* of_x,
                  float* of_weight, long rows, long width, int threads) {
  const long each = (rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < threads; ++part) {
    float* sums = of_weight + part * width;
    for (long row = part * each; row < least(rows, (part + 1) * each); ++row) {
      const bf16 *g = grad + row * width, *in = x + row * width;
      const float s = scale[row];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (long i = 0; i < width; ++i) {
        const float product = wide(g[i]) * wide(in[i]) * s;
        sums[i] += product;
        dot += product * wide(weight[i]);
      }
      const float mean = dot / static_cast<float>(width);
      bf16* made = of_x + row * width;
#pragma omp simd
      for (long i = 0; i < width; ++i) made[i] = narrow(s * (wide(g[i]) * wide(weight[i]) - wide(in[i]) * s * mean));
    }
  }
}

// Heads of a token lie side by side; tokens are in_step and out_step apart. Angles repeat after period tokens.
void turn(const bf16* in, const bf16* cosine, const bf16* sine, bf16* out, long tokens, long period, long heads,
          long width, long in_step, long out_step, float sign, int threads) {
  const long half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long token = 0; token < tokens; ++token) {
    const bf16 *c = cosine + token % period * width, *s = sine + token % period * width;
    for (long head = 0; head < heads; ++head) {
      const bf16* from = in + token * in_step + head * width;
      bf16* to = out + token * out_step + head * width;
#pragma omp simd
      for (long i = 0; i < half; ++i) {
        const float a = wide(from[i]), b = wide(from[half + i]);
        to[i] = narrow(a * wide(c[i]) - b * sign * wide(s[i]));
        to[half + i] = narrow(b * wide(c[half + i]) + a * sign * wide(s[half + i]));
      }
    }
  }
}

// Scores of rows of queries, the last of them beside the last key, become probabilities; norms are log-sum-exps.
void causal_softmax(float* scores, bf16* weights, float* norms, long rows, long queries, long keys, float scale,
                    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; ++row) {
    float* x = scores + row * keys;
    bf16* made = weights + row * keys;
    const long seen = keys - queries + row % queries + 1;
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < seen; ++i) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < seen; ++i) sum += x[i] = exponential((x[i] - most) * scale);
    const float each = 1.0f / sum;
    norms[row] = most * scale + std::log(sum);
#pragma omp simd
    for (long i = 0; i < seen; ++i) made[i] = narrow(x[i] * each);
    std::memset(made + seen, 0, static_cast<std::size_t>(keys - seen) * sizeof(bf16));
  }
}

// Probabilities again, and gradients: those of the probabilities become those of the unscaled scores, in place.
void causal_gradient(const float* scores, bf16* gradients, bf16* weights, const float* norms, const float* dots,
                     long rows, long queries, long keys, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; ++row) {
    const float *x = scores + row * keys, norm = norms[row], dot = dots[row];
    bf16 *g = gradients + row * keys, *made = weights + row * keys;
    const long seen = keys - queries + row % queries + 1, rest = keys - seen;
#pragma omp simd
    for (long i = 0; i < seen; ++i) {
      const float p = exponential(x[i] * scale - norm);
      made[i] = narrow(p);
      g[i] = narrow(p * (wide(g[i]) - dot) * scale);
    }
    std::memset(made + seen, 0, static_cast<std::size_t>(rest) * sizeof(bf16));
    std::memset(g + seen, 0, static_cast<std::size_t>(rest) * sizeof(bf16));
  }
}

// Logits become the gradient of factor x cross entropy in place; a negative label counts nothing.
void softmax_gradient(bf16* logits, const std::int64_t* labels, float* losses, long rows, long width, float factor,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; ++row) {
    bf16* x = logits + row * width;
    const long label = static_cast<long>(labels[row]);
    losses[row] = 0.0f;
    if (label < 0) {
      std::memset(x, 0, static_cast<std::size_t>(width) * sizeof(bf16));
      continue;
    }
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < width; ++i) most = wide(x[i]) > most ? wide(x[i]) : most;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; ++i) sum += exponential(wide(x[i]) - most);
    const float wanted = wide(x[label]) - most, each = factor / sum;
    losses[row] = std::log(sum) - wanted;
#pragma omp simd
    for (long i = 0; i < width; ++i) x[i] = narrow(exponential(wide(x[i]) - most) * each);
    x[label] = narrow(exponential(wanted) * each - factor);
  }
}

}  // extern "C"
