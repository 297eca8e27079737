// group_sums with AVX-512.
#include "group_sums_driver.h"
#include "lanes_avx512.h"

namespace fastlora::cpu {

Status group_sums_avx512(const GroupSumsArgs& args) { return group_sums_with<Avx512Lanes>(args); }

}  // namespace fastlora::cpu
