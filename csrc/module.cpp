// fastopt._C: the Python face of the extension, and the only unit that includes torch's Python headers (27 s).
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <map>
#include <stdexcept>

#include "cuda_driver.h"
#include "plan.h"

namespace fastopt {

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }
c10::TensorImpl* impl_of(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

}  // namespace fastopt

namespace {

using fastopt::Plan;

template <class F>
auto translated(F f) {
  try {
    return f();
  } catch (const fastopt::PythonError&) {
    throw py::error_already_set();
  }
}

// The plan holds parameters, and a parameter's hooks may hold the optimizer that holds the plan: the garbage collector
// must be able to see through it.
void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    if (!instance->get_value_and_holder().holder_constructed()) return 0;
    return py::cast<Plan&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    if (instance->get_value_and_holder().holder_constructed()) py::cast<Plan&>(py::handle(self)).clear();
    return 0;
  };
}

// Asks the kernel to back memory with huge pages, before it is first touched. Only advice: a refusal changes nothing.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Read from the file before it is loaded (fastopt/backends/native.py).
  static const char stamp[] = "fastopt built for torch " FASTOPT_TORCH_VERSION;
  m.attr("torch_version") = std::string(stamp).substr(sizeof "fastopt built for torch " - 1);
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("chain_names", &fastopt::chain_names);
  m.def("instruction_set", [] { return fastopt::instruction_set().name; });
  m.def("has_cuda", [] { return fastopt::cuda_driver() != nullptr; });
  m.def("cuda_archs", &fastopt::cuda_archs);
  m.def("cuda_why_not", &fastopt::cuda_why_not);
  m.def("emulate_only_last", &fastopt::emulate_only_last);
  m.def("has_emulator", [] { return fastopt::emulator() != nullptr; });
  py::class_<Plan>(m, "Plan", py::custom_type_setup(collectable))
      .def(py::init([](py::object hyper, py::object counters, py::object ignored, py::object intern, py::object memory,
                       const std::string& kernels) {
        static const std::map<std::string, Plan::Devices> known = {{"cuda", Plan::Devices::cuda},
                                                                   {"emulated", Plan::Devices::emulated},
                                                                   {"external", Plan::Devices::external}};
        const auto whose = known.find(kernels);
        if (whose == known.end()) throw std::invalid_argument("fastopt: no kernels are called " + kernels);
        return translated([&] {
          return std::make_unique<Plan>(hyper.ptr(), counters.ptr(), ignored.ptr(), intern.ptr(), memory.ptr(),
                                        whose->second);
        });
      }))
      .def("build",
           [](Plan& plan, py::object groups, py::object state, py::object native, py::object rows, py::object fresh) {
             translated([&] { plan.build(groups.ptr(), state.ptr(), native.ptr(), rows.ptr(), fresh.ptr()); });
           })
      .def("gather",
           [](Plan& plan, py::object groups, py::object state, py::object sync) {
             return translated([&] {
               if (plan.gather(groups.ptr(), state.ptr(), sync.ptr()) != fastopt::Verdict::ready) return false;
               plan.keep();
               return true;
             });
           })
      .def(
          "step",
          [](Plan& plan, py::dict optimizer, const std::vector<uintptr_t>& streams) {
            std::vector<Plan::DeviceStep> steps;
            for (const uintptr_t stream : streams) steps.push_back({reinterpret_cast<void*>(stream), nullptr, nullptr});
            return translated([&] { return plan.step(optimizer.ptr(), steps); });
          },
          py::arg("optimizer"), py::arg("streams") = std::vector<uintptr_t>())
      .def("release", &Plan::release)
      .def("devices", &Plan::devices)
      .def("arrange", [](Plan& plan, size_t device,
                         std::vector<uint32_t> places) { plan.external(device).arrange(std::move(places)); })
      .def("taken",
           [](Plan& plan, size_t device) {
             const auto bytes = [](const auto& list) {
               return py::bytes(reinterpret_cast<const char*>(list.data()), list.size() * sizeof list[0]);
             };
             const fastopt::DevicePlan& found = plan.external(device);
             py::list taken;
             for (const auto& one : found.taken())
               taken.append(
                   py::make_tuple(one.chain, one.first_slot, bytes(one.numbers), bytes(one.f32), bytes(one.f64)));
             return py::make_tuple(bytes(found.gradients()), taken);
           })
      .def("device_launches", &Plan::device_launches)
      .def("launch", [](Plan& plan, const std::vector<std::array<uintptr_t, 3>>& steps) {
        std::vector<Plan::DeviceStep> with;
        for (const auto& [stream, found_inf, grad_scale] : steps)
          with.push_back({reinterpret_cast<void*>(stream), reinterpret_cast<const float*>(found_inf),
                          reinterpret_cast<const float*>(grad_scale)});
        plan.launch(with);
      });
}
