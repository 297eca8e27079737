#include "tests/emulated.h"
#include "tests/testing.h"

int main() {
  fastlora::testing::test_emulator();
  fastlora::testing::test_cuda_kernels();
  fastlora::testing::test_cuda_adamw();
  fastlora::testing::test_cuda_linear();
  fastlora::testing::test_cuda_segmented();
  fastlora::testing::test_cuda_slab();
  fastlora::testing::test_cuda_wide();
  return fastlora::testing::finish();
}
