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

// Asks for pages of 2 MiB where `data` spans whole ones: for what will be written there or, with `now`, for what
// is there already, which is moved. Returns the bytes that this was granted for; 0 is no failure.
int64_t prefer_huge_pages(void* data, int64_t bytes, bool now);

}  // namespace fastlora
