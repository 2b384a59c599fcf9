// Logits of bfloat16 hidden states under a bfloat16 head, in float32.
#pragma once

#include <cstdint>

namespace vppo {

// What `product` multiplies. Rows of a matrix lie `stride` elements apart, elements of a row beside each other.
struct Product {
  const std::uint16_t* first;  // [half, hidden_size]: the rows of one view, or the first half of a single view's
  std::int64_t first_stride;
  const std::uint16_t* second;  // [rows - half, hidden_size]: those of the other
  std::int64_t second_stride;
  const bool* shares_rounding;  // [half]: whether a second row is summed as its difference from the first row beside it
  const std::uint16_t* weight;  // [columns, hidden_size]
  std::int64_t weight_stride;
  float* scratch;  // [product_scratch(rows, hidden_size)]
  float* out;      // [rows, columns]: products of the first rows, then of the second
  std::int64_t rows, columns, hidden_size;

  std::int64_t half() const { return (rows + 1) / 2; }
};

// Whether this processor multiplies bfloat16, and VPPO_KERNELS_ISA does not ask for less.
bool has_product();

// Size in floats of the working space that pairs of elements of all rows are packed into.
std::int64_t product_scratch(std::int64_t rows, std::int64_t hidden_size);

// Fills `out`. An entry depends on its two rows and its row of the weight alone, not on what is multiplied beside it.
void product(const Product& given);

}  // namespace vppo
