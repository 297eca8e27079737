#include "tests/emulated.h"
#include "tests/testing.h"

int main(int argc, char**) {
  if (argc < 2) fastlora::testing::test_emulator();
  if (argc < 2) fastlora::testing::test_cuda_kernels();
  fastlora::testing::test_cuda_linear();
  fastlora::testing::test_cuda_slab();
  fastlora::testing::test_cuda_wide();
  return fastlora::testing::finish();
}
