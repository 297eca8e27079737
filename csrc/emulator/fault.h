// What the emulator says when a kernel does what no GPU promises to survive.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace fastlora::emulator {

// A place in a kernel's source. Taken by default arguments: here() names the line of the outermost call.
struct Where {
  const char* file = "";
  int line = 0;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Where& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

// Thrown inside a fiber, caught where the fiber began.
struct Fault {
  std::string message;
};

// "file.cu:12", the folder left out.
std::string to_string(Where where);

// Throws a Fault that names the kernel, block and thread that run now, and `where`.
[[noreturn]] void fault(Where where, const std::string& what);

}  // namespace fastlora::emulator
