// The AMX kernel with its tile instructions in plain C++: level `amx_emulated`, for tests.
#define FASTLORA_AMX_EMULATE
#include "nf4_linear_amx.cpp"
