// Element types of the KV pool and the few loops that must vectorise. Included once per instruction set: everything
// lives in HK_NAMESPACE, so that the linker never mixes code of different sets.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace HK_NAMESPACE {

struct Float32 {
  using Storage = float;
  static constexpr float kMax = std::numeric_limits<float>::max();
  static inline float load(Storage x) { return x; }
  static inline Storage store(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr float kMax = 3.38953139e38f;
  static inline float load(Storage x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static inline Storage store(float x) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr float kMax = 65504.f;
  static inline float load(Storage x) {
    // Exponent and mantissa as a float 2^112 too small; the product restores it and normalises subnormals.
    uint32_t bits = uint32_t(x & 0x7fffu) << 13, scale_bits = 0x77800000u, sign = uint32_t(x & 0x8000u) << 16;
    float value, scale;
    std::memcpy(&value, &bits, 4);
    std::memcpy(&scale, &scale_bits, 4);
    value *= scale;
    uint32_t out;
    std::memcpy(&out, &value, 4);
    out |= (bits >= 0x0f800000u ? 0x7f800000u : 0u) | sign;  // infinity and NaN
    std::memcpy(&value, &out, 4);
    return value;
  }
  static inline Storage store(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // subnormal: let the adder round to a multiple of 2^-24
      float value;
      std::memcpy(&value, &bits, 4);
      value += 0.5f;
      uint32_t out;
      std::memcpy(&out, &value, 4);
      return uint16_t(sign | (out - 0x3f000000u));
    }
    return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
  }
};

template <typename T, int D>
static inline void load_row(const typename T::Storage* src, float* dst) {
#pragma omp simd
  for (int d = 0; d < D; ++d) dst[d] = T::load(src[d]);
}

template <int D>
static inline float dot(const float* a, const float* b) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

}  // namespace HK_NAMESPACE
