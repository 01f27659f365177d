// The operations' schemas and which device runs what; everything else is Python. They are registered in a namespace of
// the extension's own name, so that extensions built under different names can be loaded side by side, and as overloads,
// since the package's own operations have the same names and may be in the same namespace.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

// The macros of PyTorch and Python paste their arguments as they are written.
#define RALU_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define RALU_LIBRARY_IMPL(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)
#define RALU_JOIN(a, b) a##b
#define RALU_INIT(name) RALU_JOIN(PyInit_, name)
#define RALU_QUOTE(name) #name
#define RALU_STRING(name) RALU_QUOTE(name)

RALU_LIBRARY(TORCH_EXTENSION_NAME, m) {
  m.def(
      "upsample_renoise.out(Tensor x, Tensor(a!) out, Tensor seed, float scale, float noise_scale, float k, int stage)"
      " -> ()");
  m.def(
      "plan_tokens.out(Tensor scores, Tensor(a!) cu_seqlens, Tensor(b!) source, Tensor(c!) child, Tensor(d!) inverse,"
      " Tensor(e!) positions, int width, int count, float? threshold) -> ()");
  m.def(
      "upsample_selected.out(Tensor low, Tensor(a!) out, Tensor inverse, Tensor seed, int width, float scale,"
      " float noise_scale, float kept_scale, float k, bool pixel) -> ()");
  m.def(
      "upsample_remaining.out(Tensor packed, Tensor(a!) out, Tensor inverse, Tensor seed, int width, float scale,"
      " float noise_scale, float kept_scale, float k, bool pixel) -> ()");
  m.def("canny.out(Tensor image, Tensor(a!) edges, Tensor(b!) parent, int low, int high) -> ()");
}

RALU_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  using namespace ralu::cpu;
  m.impl("upsample_renoise.out", TORCH_BOX(&upsample_renoise));
  m.impl("plan_tokens.out", TORCH_BOX(&plan_tokens));
  m.impl("upsample_selected.out", TORCH_BOX(&upsample_selected));
  m.impl("upsample_remaining.out", TORCH_BOX(&upsample_remaining));
  m.impl("canny.out", TORCH_BOX(&canny));
}

#if defined(CUDA_KERNEL) && !defined(RALU_CUDA)  // kernel-builder's macro
#define RALU_CUDA
#endif

#ifdef RALU_CUDA
RALU_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  using namespace ralu::cuda;
  m.impl("upsample_renoise.out", TORCH_BOX(&upsample_renoise));
  m.impl("plan_tokens.out", TORCH_BOX(&plan_tokens));
  m.impl("upsample_selected.out", TORCH_BOX(&upsample_selected));
  m.impl("upsample_remaining.out", TORCH_BOX(&upsample_remaining));
  m.impl("canny.out", TORCH_BOX(&canny));
}
#endif

// Importing the extension runs the registrations above; the module itself says only whether they include CUDA.
PyMODINIT_FUNC RALU_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, RALU_STRING(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef RALU_CUDA
  const bool cuda = true;
#else
  const bool cuda = false;
#endif
  if (module) PyModule_AddIntConstant(module, "cuda", cuda);
  return module;
}
