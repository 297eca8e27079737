// The groups of checks that kernel_tests.cpp runs.
#pragma once

#include <vector>

#include "fastlora/status.h"

namespace fastlora::testing {

// Every level this machine can run, lowest first.
const std::vector<Isa>& levels();

void test_numeric();       // scalar conversions, parallel_ranges
void test_format();        // quantise, double-quantise, dequantise
void test_linear();        // nf4_linear, nf4_linear_grad_input
void test_segmented();     // many adapters in one batch
void test_lora_dropout();  // lora_dropout
void test_adamw();         // adamw, adamw_8bit
void test_concurrency();   // two threads at once
void test_scratch();       // the bound on a thread's scratch memory
void test_refusals();      // statuses for what the callers should have refused

}  // namespace fastlora::testing
