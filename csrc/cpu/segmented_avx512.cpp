// The products of many adapters with AVX-512.
#include "lanes_avx512.h"
#include "segmented_products.h"

namespace fastlora::cpu {

Status segmented_shrink_avx512(const ShrinkArgs& args) { return Segmented<Avx512Lanes>::shrink(args); }
Status segmented_expand_avx512(const ExpandArgs& args) { return Segmented<Avx512Lanes>::expand(args); }
Status segmented_outer_avx512(const OuterArgs& args) { return Segmented<Avx512Lanes>::outer(args); }

}  // namespace fastlora::cpu
