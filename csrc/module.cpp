// `ncpvae._C`: what Python asks about the build. It binds no tensors; the ops reach torch through the libraries.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "cpu/capability.h"
#include "philox.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) { return *text ? py::object(py::str(text)) : py::none(); }

py::dict build_info() {
  py::dict info;
  info["version"] = NCPVAE_VERSION;
  info["compiler"] = NCPVAE_COMPILER;
  info["torch"] = NCPVAE_TORCH_VERSION;
  info["cuda_compiler"] = text_or_none(NCPVAE_CUDA_COMPILER);
  info["cuda_architectures"] = text_or_none(NCPVAE_CUDA_ARCHITECTURES);
  return info;
}

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const ncpvae::Words words =
      ncpvae::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {words.x[0], words.x[1], words.x[2], words.x[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about ncpvae's compiled part.";
  m.def("build_info", &build_info, "Versions and compilers this build was made with.");
  m.def("cpu_capability", &ncpvae::cpu_capability, "The instruction set level of this processor.");
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Philox4x32-10 of one counter, for tests.");
}
