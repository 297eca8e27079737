// The products of many adapters with AVX2 and FMA.
#include "lanes_avx2.h"
#include "segmented_products.h"

namespace fastlora::cpu {

Status segmented_shrink_avx2(const ShrinkArgs& args) { return Segmented<Avx2Lanes>::shrink(args); }
Status segmented_expand_avx2(const ExpandArgs& args) { return Segmented<Avx2Lanes>::expand(args); }
Status segmented_outer_avx2(const OuterArgs& args) { return Segmented<Avx2Lanes>::outer(args); }

}  // namespace fastlora::cpu
