// CPUID and XGETBV say what the processor and the operating system allow; AMX asks the kernel besides.
#include "fastlora/cpu.h"

#ifdef FASTLORA_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlora {
namespace {

#ifdef FASTLORA_X86

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros for an unknown leaf
  return r;
}

bool bit(uint32_t word, int position) { return ((word >> position) & 1u) != 0; }

uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux hands out the 8 KiB of tile state only on request (since 5.16); once asked, the whole process has it.
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;

  Features() {
    const Leaf l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
    if (!bit(l1.ecx, 27)) return;  // OSXSAVE
    const uint64_t xcr0 = xgetbv0();
    const bool os_ymm = (xcr0 & 0x6) == 0x6, os_zmm = (xcr0 & 0xe6) == 0xe6;
    const bool os_tiles = (xcr0 & 0x60000) == 0x60000;
    avx2 = os_ymm && bit(l1.ecx, 28) && bit(l7.ebx, 5) && bit(l1.ecx, 12) && bit(l1.ecx, 29);  // FMA, F16C
    avx512 = avx2 && os_zmm && bit(l7.ebx, 16) && bit(l7.ebx, 30) && bit(l7.ebx, 17) && bit(l7.ebx, 31) &&
             bit(l7.ecx, 11);  // F BW DQ VL VNNI
    avx512_bf16 = avx512 && bit(l71.eax, 5);
    amx = avx512_bf16 && os_tiles && bit(l7.edx, 24) && bit(l7.edx, 22) && request_amx_permission();
  }
};

#else

struct Features {  // another processor: the scalar level
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
};

#endif

const Features& features() {
  static const Features f;
  return f;
}

}  // namespace

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return features().avx2;
    case Isa::kAvx512: return features().avx512;
    case Isa::kAvx512Bf16: return features().avx512_bf16;
    case Isa::kAmx: return features().amx;
    case Isa::kAmxEmulated: return features().avx512_bf16;
  }
  return false;
}

Isa best_isa() {
  for (int32_t level = static_cast<int32_t>(Isa::kAmx); level > 0; --level) {
    if (isa_available(static_cast<Isa>(level))) return static_cast<Isa>(level);
  }
  return Isa::kScalar;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
    case Isa::kAmxEmulated: return "amx_emulated";
  }
  return "unknown";
}

}  // namespace fastlora
