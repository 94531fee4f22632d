// The logistic function as parabolas, for results that are rounded to bytes: to 1e-4 between -8 and
// 8, and constant outside. A lookup and two multiply-adds, the same bits with every instruction set
// that has them. No torch header.
#pragma once

namespace cvkernels {

// Between REACH and -REACH, in PIECES of one width; piece i is a[i] + b[i] * t + c[i] * t^2 for t
// from 0 to 1.
struct SigmoidTable {
  static constexpr int PIECES = 32;
  static constexpr float REACH = 8.0f;
  alignas(64) float a[PIECES];
  alignas(64) float b[PIECES];
  alignas(64) float c[PIECES];
};

namespace sigmoid_table {

constexpr double exponential(double x) {
  double term = 1.0, sum = 1.0;
  for (int n = 1; n < 24; ++n) {
    term *= x / 16.0 / n;
    sum += term;
  }
  for (int squarings = 0; squarings < 4; ++squarings) sum *= sum;
  return sum;
}

constexpr double sigmoid(double x) { return 1.0 / (1.0 + exponential(-x)); }

// Through the values at Chebyshev's three points of each piece, which is within a quarter of the
// best parabola's error.
constexpr SigmoidTable make() {
  SigmoidTable table{};
  constexpr double WIDTH = 2.0 * SigmoidTable::REACH / SigmoidTable::PIECES;
  constexpr double FIRST = 0.0669872981077807, MIDDLE = 0.5, LAST = 0.9330127018922193;
  for (int i = 0; i < SigmoidTable::PIECES; ++i) {
    const double start = i * WIDTH - static_cast<double>(SigmoidTable::REACH);
    const double first = sigmoid(start + FIRST * WIDTH), middle = sigmoid(start + MIDDLE * WIDTH);
    const double last = sigmoid(start + LAST * WIDTH);
    const double slope = (middle - first) / (MIDDLE - FIRST);
    const double bend = ((last - middle) / (LAST - MIDDLE) - slope) / (LAST - FIRST);
    table.a[i] = static_cast<float>(first - slope * FIRST + bend * FIRST * MIDDLE);
    table.b[i] = static_cast<float>(slope - bend * (FIRST + MIDDLE));
    table.c[i] = static_cast<float>(bend);
  }
  return table;
}

}  // namespace sigmoid_table

inline constexpr SigmoidTable SIGMOID = sigmoid_table::make();

}  // namespace cvkernels
