// How a call of the layer is done: made by nf4_linear_plan.cu, followed by nf4_linear.cu.
#pragma once

#include "fastlora/cuda.h"
#include "nf4_linear.cuh"

namespace fastlora::cuda {

// What both directions have in common.
struct Shape {
  int64_t m, outer, contraction, r;
  const Nf4Weight* weight;
  const void* x;
  DType dtype;
  CudaRoute wanted;
  bool grad;
};

struct Plan {
  CudaRoute route;
  bool ragged;       // scale blocks straddle rows of W, or it or x is not in whole vectors
  int columns;       // of a tile: right operands of 8 rows of x, or rows of x; or the rows of W of a decode block
  int splits, span;  // of the contraction
  int inner_splits;  // of that of u; 0: u is whole
};

// False after an error of the device. `inner_is_wanted`: u is an output, or an input.
bool make_plan(const Shape& shape, bool inner_is_wanted, Plan* plan);

// A plan's product, less its low-rank term; and what its parts take of scratch. In nf4_linear.cu.
ProductArgs product_args(const Plan& plan, const Shape& s, const float* map, void* out, float* parts);
int64_t part_bytes(const Plan& plan, const Shape& s);

}  // namespace fastlora::cuda
