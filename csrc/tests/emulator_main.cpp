#include "tests/emulated.h"
#include "tests/testing.h"

int main() {
  fastlora::testing::test_emulator();
  fastlora::testing::test_cuda_kernels();
  return fastlora::testing::finish();
}
