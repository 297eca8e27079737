// The module _emulator, for tests: the CUDA entry points as _C.cuda has them, run by the emulator, and its
// controls.
#include "bindings.h"
#include "launch.h"
#include "tests/emulated.h"
#include "tests/testing.h"

namespace py = pybind11;
using namespace fastlora;

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "fastlora's CUDA kernels on an emulated device; for tests";
  bind_cuda(m);
  m.def("add_buffer", [](uintptr_t base, int64_t bytes, bool writable, const std::string& name) {
    emulator::add_buffer(reinterpret_cast<const void*>(base), bytes, writable, name);
  });
  m.def("remove_buffer", [](uintptr_t base) { emulator::remove_buffer(reinterpret_cast<const void*>(base)); });
  m.def("set_seed", &emulator::set_seed);
  const emulator::Traits usual;
  m.def(
      "set_traits",
      [](int capability, int processors, int shared_bytes, int block_clocks) {
        emulator::set_traits({capability, processors, shared_bytes, block_clocks});
      },
      py::arg("capability") = usual.capability, py::arg("processors") = usual.processors,
      py::arg("shared_bytes") = usual.shared_bytes, py::arg("block_clocks") = usual.block_clocks);
  // (kernel, grid, threads, shared bytes, cooperative, overlaps) of every launch since list_launches(run).
  m.def("list_launches", &emulator::list_launches);
  m.def("take_launches", [] {
    py::list all;
    for (const emulator::Launched& it : emulator::take_launches()) {
      all.append(py::make_tuple(it.kernel, py::make_tuple(it.grid[0], it.grid[1], it.grid[2]), it.threads,
                                it.shared_bytes, it.cooperative, it.overlaps));
    }
    return all;
  });
  // (file, line, access, instructions, bytes, cost, least) of every line since the last call.
  m.def("take_counts", [] {
    constexpr const char* kAccess[] = {"global load", "global store", "shared load", "shared store"};
    py::list all;
    for (const emulator::LineCount& it : emulator::take_counts()) {
      all.append(py::make_tuple(it.file, it.line, kAccess[static_cast<int>(it.access)], it.instructions, it.bytes,
                                it.cost, it.least));
    }
    return all;
  });
  // csrc/tests: whether every check held; what failed is on standard error.
  m.def("self_test", [] {
    testing::test_emulator();
    return testing::finish() == 0;
  });
  m.def("kernel_test", [] {
    testing::test_cuda_kernels();
    testing::test_cuda_adamw();
    return testing::finish() == 0;
  });
  m.def("segmented_test", [] {
    testing::test_cuda_segmented();
    return testing::finish() == 0;
  });
}
