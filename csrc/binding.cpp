// The schemas of ralu_kernels_C and which device runs what; everything else is Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(ralu_kernels_C, m) {
  m.def(
      "upsample_renoise(Tensor x, Tensor(a!) out, Tensor seed, float scale, float noise_scale, float k, int stage)"
      " -> ()");
  m.def(
      "plan_tokens(Tensor scores, Tensor(a!) cu_seqlens, Tensor(b!) source, Tensor(c!) child, Tensor(d!) inverse,"
      " Tensor(e!) positions, int width, int count, float? threshold) -> ()");
  m.def(
      "promote_tokens(Tensor low, Tensor(a!) out, Tensor inverse, Tensor seed, int width, float scale,"
      " float noise_scale, float carry_scale, float k, bool pixel) -> ()");
  m.def(
      "merge_tokens(Tensor packed, Tensor(a!) out, Tensor inverse, Tensor seed, int width, float scale,"
      " float noise_scale, float carry_scale, float k, bool pixel) -> ()");
  m.def("canny(Tensor image, Tensor(a!) edges, Tensor(b!) parent, int low, int high) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ralu_kernels_C, CPU, m) {
  using namespace ralu::cpu;
  m.impl("upsample_renoise", TORCH_BOX(&upsample_renoise));
  m.impl("plan_tokens", TORCH_BOX(&plan_tokens));
  m.impl("promote_tokens", TORCH_BOX(&promote_tokens));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens));
}

#ifdef RALU_CUDA
STABLE_TORCH_LIBRARY_IMPL(ralu_kernels_C, CUDA, m) {
  using namespace ralu::cuda;
  m.impl("upsample_renoise", TORCH_BOX(&upsample_renoise));
  m.impl("plan_tokens", TORCH_BOX(&plan_tokens));
  m.impl("promote_tokens", TORCH_BOX(&promote_tokens));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens));
  m.impl("canny", TORCH_BOX(&canny));
}
#endif

// Importing ralu_kernels._C runs the registrations above; the module itself says only whether they include CUDA.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef RALU_CUDA
  const bool cuda = true;
#else
  const bool cuda = false;
#endif
  if (module) PyModule_AddIntConstant(module, "cuda", cuda);
  return module;
}
