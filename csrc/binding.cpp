// The operations' schemas and which device runs what; everything else is Python. They are registered in a namespace of
// the extension's own name, so that extensions built under different names can be loaded side by side.
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
      "upsample_renoise(Tensor x, Tensor(a!) out, Tensor seed, float scale, float noise_scale, float k, int stage)"
      " -> ()");
  m.def(
      "plan_tokens(Tensor scores, Tensor(a!) cu_seqlens, Tensor(b!) source, Tensor(c!) child, Tensor(d!) inverse,"
      " Tensor(e!) positions, int width, int count, float? threshold) -> ()");
  m.def(
      "upsample_selected(Tensor low, Tensor(a!) out, Tensor inverse, Tensor seed, int width, float scale,"
      " float noise_scale, float kept_scale, float k, bool pixel) -> ()");
  m.def(
      "upsample_remaining(Tensor packed, Tensor(a!) out, Tensor inverse, Tensor seed, int width, float scale,"
      " float noise_scale, float kept_scale, float k, bool pixel) -> ()");
  m.def("canny(Tensor image, Tensor(a!) edges, Tensor(b!) parent, int low, int high) -> ()");
}

RALU_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  using namespace ralu::cpu;
  m.impl("upsample_renoise", TORCH_BOX(&upsample_renoise));
  m.impl("plan_tokens", TORCH_BOX(&plan_tokens));
  m.impl("upsample_selected", TORCH_BOX(&upsample_selected));
  m.impl("upsample_remaining", TORCH_BOX(&upsample_remaining));
  m.impl("canny", TORCH_BOX(&canny));
}

#ifdef RALU_CUDA
RALU_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  using namespace ralu::cuda;
  m.impl("upsample_renoise", TORCH_BOX(&upsample_renoise));
  m.impl("plan_tokens", TORCH_BOX(&plan_tokens));
  m.impl("upsample_selected", TORCH_BOX(&upsample_selected));
  m.impl("upsample_remaining", TORCH_BOX(&upsample_remaining));
  m.impl("canny", TORCH_BOX(&canny));
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
