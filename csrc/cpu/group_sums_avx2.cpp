// group_sums with AVX2.
#include "group_sums_driver.h"
#include "lanes_avx2.h"

namespace fastlora::cpu {

Status group_sums_avx2(const GroupSumsArgs& args) { return group_sums_with<Avx2Lanes>(args); }

}  // namespace fastlora::cpu
