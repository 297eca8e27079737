// What the CPU can do, and what the kernels keep on it.
#pragma once

#include "fastlora/status.h"

namespace fastlora {

// Whether this machine (CPU, operating system, and for AMX the kernel's permission) can run `isa`.
bool isa_available(Isa isa);

// The best available level that is not an emulation.
Isa best_isa();

// "scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"
const char* isa_name(Isa isa);

// The bytes of scratch that the calling thread holds, between calls too.
int64_t scratch_bytes();

}  // namespace fastlora
