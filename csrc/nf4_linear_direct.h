// The function of nf4_linear_direct.cpp, for the module in bindings.cpp.
#pragma once

#include <Python.h>

namespace fastlora {

int add_nf4_linear_direct(PyObject* module);  // 0, or -1 with a Python error

}  // namespace fastlora
