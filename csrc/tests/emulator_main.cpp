#include "tests/emulated.h"
#include "tests/testing.h"

int main(int argc, char** argv) {
  using namespace fastlora::testing;
  constexpr Group kGroups[] = {
      {"emulator", test_emulator},  {"kernels", test_cuda_kernels},     {"adamw", test_cuda_adamw},
      {"linear", test_cuda_linear}, {"segmented", test_cuda_segmented}, {"slab", test_cuda_slab},
      {"wide", test_cuda_wide},
  };
  return run_groups(argc, argv, kGroups, sizeof kGroups / sizeof kGroups[0]);
}
