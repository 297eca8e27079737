// adamw and adamw_8bit, less a level's vectors. A level's file gives a struct of static functions (in its
// anonymous namespace, so that nothing instantiated here can leak into another level): those of lanes_avx2.h, and
//
//   sub, div, sqrt                                   each rounded once
//   Vec larger_magnitude(Vec a, Vec b)               of |a| and |b| by their bits: NaN is the largest
//   float largest(Vec a)                             of its lanes, by their bits
//   Vec decode(const DynamicMap&, const uint8_t*)    kLanes codes
//   void encode<kSigned>(const DynamicMap&, Vec, uint8_t*)   kLanes codes; without a sign none is 0 but of 0
#pragma once

#include "dynamic_map.h"
#include "fastlora/adamw.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

template <class L>
struct AdamwVectors {
  typename L::Vec decay, weight1, beta2, weight2, correction2, eps, minus_step;
  bool near;  // lerp counts from the nearer end

  explicit AdamwVectors(const AdamwStep& s)
      : decay(L::set1(s.decay)),
        weight1(L::set1(s.weight1 < 0.5f ? s.weight1 : s.weight1 - 1.0f)),
        beta2(L::set1(s.beta2)),
        weight2(L::set1(s.weight2)),
        correction2(L::set1(s.correction2)),
        eps(L::set1(s.eps)),
        minus_step(L::set1(s.minus_step)),
        near(s.weight1 < 0.5f) {}

  // Returns the parameter.
  typename L::Vec update(typename L::Vec p, typename L::Vec g, typename L::Vec& m, typename L::Vec& v) const {
    m = L::fma(weight1, L::sub(g, m), near ? m : g);
    v = L::fma(L::mul(weight2, g), g, L::mul(v, beta2));
    const typename L::Vec denominator = L::add(L::div(L::sqrt(v), correction2), eps);
    return L::add(L::mul(p, decay), L::div(L::mul(minus_step, m), denominator));
  }
};

// A thread gets whole units, so that no two write to one cache line of a parameter.
constexpr int64_t kAdamwUnit = 4096;

template <class L, DType P, DType G>
void adamw_range(void* context, int64_t unit_begin, int64_t unit_end) {
  const AdamwArgs& a = *static_cast<const AdamwArgs*>(context);
  const AdamwVectors<L> step(a.step);
  const int64_t begin = unit_begin * kAdamwUnit, end = min64(unit_end * kAdamwUnit, a.count);
  int64_t i = begin;
  for (; i + L::kLanes <= end; i += L::kLanes) {
    typename L::Vec m = L::load_floats(a.exp_avg + i), v = L::load_floats(a.exp_avg_sq + i);
    void* p = element_ptr(a.param, i, P);
    const typename L::Vec next =
        step.update(L::template load<P>(p), L::template load<G>(element_ptr(a.grad, i, G)), m, v);
    L::store_floats(a.exp_avg + i, m);
    L::store_floats(a.exp_avg_sq + i, v);
    L::store(p, P, next, L::kLanes);
  }
  if (i < end) {
    const int64_t rest = end - i;
    typename L::Vec m = L::load(a.exp_avg + i, DType::kFloat32, rest);
    typename L::Vec v = L::load(a.exp_avg_sq + i, DType::kFloat32, rest);
    void* p = element_ptr(a.param, i, P);
    const typename L::Vec next =
        step.update(L::load(p, P, rest), L::load(element_ptr(a.grad, i, G), G, rest), m, v);
    L::store(a.exp_avg + i, DType::kFloat32, m, rest);
    L::store(a.exp_avg_sq + i, DType::kFloat32, v, rest);
    L::store(p, P, next, rest);
  }
}

inline float adamw_scale(float largest) { return largest == 0.0f ? 0.0f : largest < 1e-38f ? 1e-38f : largest; }

// One block, of codes in whole vectors; `count` elements of it are there.
template <class L, DType P, DType G>
void adamw_block(const Adamw8bitArgs& a, const AdamwVectors<L>& step, int64_t block, int64_t count,
                 uint8_t* codes1, uint8_t* codes2) {
  using Vec = typename L::Vec;
  const DynamicMap &map1 = signed_map(), &map2 = unsigned_map();
  const Vec scale1 = L::set1(a.exp_avg_scale[block]), scale2 = L::set1(a.exp_avg_sq_scale[block]);
  alignas(64) float first[kAdamwBlocksize], second[kAdamwBlocksize];
  Vec largest1 = L::zero(), largest2 = L::zero();
  int64_t i = 0;
  for (; i < count; i += L::kLanes) {
    const int64_t rest = count - i, at = block * kAdamwBlocksize + i;
    Vec m = L::mul(L::decode(map1, codes1 + i), scale1), v = L::mul(L::decode(map2, codes2 + i), scale2);
    void* p = element_ptr(a.param, at, P);
    const void* g = element_ptr(a.grad, at, G);
    const Vec next = rest >= L::kLanes ? step.update(L::template load<P>(p), L::template load<G>(g), m, v)
                                       : step.update(L::load(p, P, rest), L::load(g, G, rest), m, v);
    L::store(p, P, next, rest);
    L::store_floats(first + i, m);
    L::store_floats(second + i, v);
    largest1 = L::larger_magnitude(largest1, m);
    largest2 = L::larger_magnitude(largest2, v);
  }
  const float new1 = adamw_scale(L::largest(largest1)), new2 = adamw_scale(L::largest(largest2));
  a.exp_avg_scale[block] = new1;
  a.exp_avg_sq_scale[block] = new2;
  const Vec inverse1 = L::set1(new1 == 0.0f ? 0.0f : 1.0f / new1);
  const Vec inverse2 = L::set1(new2 == 0.0f ? 0.0f : 1.0f / new2);
  for (i = 0; i < count; i += L::kLanes) {
    L::template encode<true>(map1, L::mul(L::load_floats(first + i), inverse1), codes1 + i);
    L::template encode<false>(map2, L::mul(L::load_floats(second + i), inverse2), codes2 + i);
  }
}

template <class L, DType P, DType G>
void adamw_8bit_range(void* context, int64_t block_begin, int64_t block_end) {
  const Adamw8bitArgs& a = *static_cast<const Adamw8bitArgs*>(context);
  const AdamwVectors<L> step(a.step);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = block * kAdamwBlocksize, count = min64(kAdamwBlocksize, a.count - begin);
    if (count == kAdamwBlocksize) {
      adamw_block<L, P, G>(a, step, block, count, a.exp_avg + begin, a.exp_avg_sq + begin);
      continue;
    }
    // Zeros past the end: they are no block's largest.
    uint8_t codes1[kAdamwBlocksize], codes2[kAdamwBlocksize];
    std::memset(codes1, signed_map().zero, sizeof codes1);
    std::memset(codes2, unsigned_map().zero, sizeof codes2);
    std::memcpy(codes1, a.exp_avg + begin, static_cast<size_t>(count));
    std::memcpy(codes2, a.exp_avg_sq + begin, static_cast<size_t>(count));
    adamw_block<L, P, G>(a, step, block, count, codes1, codes2);
    std::memcpy(a.exp_avg + begin, codes1, static_cast<size_t>(count));
    std::memcpy(a.exp_avg_sq + begin, codes2, static_cast<size_t>(count));
  }
}

// A thread is worth waking for about 10 us of work.
constexpr int64_t kAdamwPerThread = 1 << 14;

inline int32_t adamw_threads(int64_t count, int32_t threads) {
  return static_cast<int32_t>(min64(threads, count / kAdamwPerThread + 1));
}

using AdamwRange = void (*)(void*, int64_t, int64_t);

// range<P, G> of two dtypes.
template <class Ranges>
AdamwRange adamw_range_of(DType p, DType g) {
  constexpr DType kF = DType::kFloat32, kB = DType::kBFloat16, kH = DType::kFloat16;
  constexpr AdamwRange kRanges[3][3] = {
      {Ranges::template of<kF, kF>, Ranges::template of<kF, kB>, Ranges::template of<kF, kH>},
      {Ranges::template of<kB, kF>, Ranges::template of<kB, kB>, Ranges::template of<kB, kH>},
      {Ranges::template of<kH, kF>, Ranges::template of<kH, kB>, Ranges::template of<kH, kH>}};
  return kRanges[static_cast<int32_t>(p)][static_cast<int32_t>(g)];
}

template <class L>
struct AdamwRanges {
  template <DType P, DType G>
  static constexpr AdamwRange of = adamw_range<L, P, G>;
};

template <class L>
struct Adamw8bitRanges {
  template <DType P, DType G>
  static constexpr AdamwRange of = adamw_8bit_range<L, P, G>;
};

template <class L>
Status adamw_with(const AdamwArgs& a) {
  parallel_ranges(ceil_div(a.count, kAdamwUnit), adamw_threads(a.count, a.threads),
                  adamw_range_of<AdamwRanges<L>>(a.dtype, a.grad_dtype), const_cast<AdamwArgs*>(&a));
  return Status::kOk;
}

template <class L>
Status adamw_8bit_with(const Adamw8bitArgs& a) {
  parallel_ranges(ceil_div(a.count, kAdamwBlocksize), adamw_threads(a.count, a.threads),
                  adamw_range_of<Adamw8bitRanges<L>>(a.dtype, a.grad_dtype), const_cast<Adamw8bitArgs*>(&a));
  return Status::kOk;
}

}  // namespace
}  // namespace fastlora::cpu
