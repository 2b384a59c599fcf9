// A product of 16-bit operands as a Hopper tensor core sums it: 16 products at a time, exact ones, are added to the sum
// so far. All 17 terms are cut off at 25 binary places below the largest exponent among them, toward zero, added as
// integers, and the result is cut off at the 24 bits of a float32.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;  // columns that are summed side by side
constexpr int64_t STEP = 16;   // products that are added at once
constexpr int32_t PLACES = 25, BITS = 24;
constexpr int32_t ZERO = -1000, LOWEST = -90;  // exponents: of a zero, and the smallest whose power of two is formed

int32_t exponent(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t biased = (bits >> 23) & 255;
  return biased ? biased - 127 : ZERO;
}

float power_of_two(int32_t exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float cut_to_float(int32_t sum, float unit) {
  uint32_t size = sum < 0 ? -static_cast<uint32_t>(sum) : sum;
  const int32_t width = size ? 32 - __builtin_clz(size) : 0;
  const int32_t beyond = std::max(width - BITS, 0);
  const float value = static_cast<float>(size >> beyond << beyond) * unit;
  return sum < 0 ? -value : value;
}

}  // namespace

// out[rows, columns] += a[rows, depth] @ b[columns, depth]^T, the sums beginning with what is in `out`; the operands are
// 16-bit numbers held as float32.
extern "C" void multiply(const float* a, const float* b, float* out, int64_t rows, int64_t columns, int64_t depth) {
  const int64_t padded = (depth + STEP - 1) / STEP * STEP;
  std::vector<float> lanes(padded * LANES);
  std::vector<int32_t> exponents(padded * LANES);
  for (int64_t first = 0; first < columns; first += LANES) {
    const int64_t width = std::min(LANES, columns - first);
    for (int64_t k = 0; k < padded; ++k)
      for (int64_t l = 0; l < LANES; ++l) {
        const float x = k < depth && l < width ? b[(first + l) * depth + k] : 0.0f;
        lanes[k * LANES + l] = x;
        exponents[k * LANES + l] = exponent(x);
      }
    for (int64_t row = 0; row < rows; ++row) {
      float sum[LANES] = {};
      std::copy_n(out + row * columns + first, width, sum);
      for (int64_t start = 0; start < padded; start += STEP) {
        float left[STEP];
        int32_t left_exponent[STEP], top[LANES], total[LANES];
        float scale[LANES], unit[LANES];
        for (int64_t k = 0; k < STEP; ++k) {
          left[k] = start + k < depth ? a[row * depth + start + k] : 0.0f;
          left_exponent[k] = exponent(left[k]);
        }
        for (int64_t l = 0; l < LANES; ++l) top[l] = std::max(exponent(sum[l]), LOWEST);
        for (int64_t k = 0; k < STEP; ++k)
          for (int64_t l = 0; l < LANES; ++l)
            top[l] = std::max(top[l], left_exponent[k] + exponents[(start + k) * LANES + l]);
        for (int64_t l = 0; l < LANES; ++l) {
          scale[l] = power_of_two(PLACES - top[l]);
          unit[l] = power_of_two(top[l] - PLACES);
          total[l] = static_cast<int32_t>(sum[l] * scale[l]);
        }
        for (int64_t k = 0; k < STEP; ++k)
          for (int64_t l = 0; l < LANES; ++l)
            total[l] += static_cast<int32_t>(left[k] * lanes[(start + k) * LANES + l] * scale[l]);
        for (int64_t l = 0; l < LANES; ++l) sum[l] = cut_to_float(total[l], unit[l]);
      }
      std::copy_n(sum, width, out + row * columns + first);
    }
  }
}
