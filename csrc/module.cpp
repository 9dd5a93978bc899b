// fastopt._C: the Python face of the extension, and the only unit that includes torch's Python headers (27 s).
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <map>
#include <stdexcept>

#include "crew.h"
#include "cuda_driver.h"
#include "gradients.h"
#include "plan.h"
#include "survey.h"

namespace fastopt {

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }
bool is_exact_tensor(PyObject* object) { return THPVariable_CheckExact(object); }
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

// Plan.step(optimizer, *streams): Plan::step of the optimizer whose __dict__ is given. By hand, for in a training
// nothing of pybind11's way to a function is left in the caches: of a single tensor's step that was a quarter (AMD
// EPYC).
PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    Plan* const plan = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<Plan>();
    if (!plan || count < 1 || !PyDict_Check(arguments[0]))
      throw std::invalid_argument("fastopt: Plan.step() wants a plan and an optimizer's dict");
    std::vector<Plan::DeviceStep> steps;
    for (Py_ssize_t i = 1; i < count; ++i) {
      steps.push_back({PyLong_AsVoidPtr(arguments[i]), nullptr, nullptr});
      if (PyErr_Occurred()) return nullptr;
    }
    return PyBool_FromLong(plan->step(arguments[0], steps));
  } catch (const fastopt::PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

PyMethodDef step_method = {
    "step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step)), METH_FASTCALL,
    "One step of the optimizer with this __dict__, on these streams; False if it is not for it."};

// A stream, where the overflow flag is and where the loss scale.
using Addresses = std::vector<std::array<uintptr_t, 3>>;

std::vector<Plan::DeviceStep> device_steps(const Addresses& given) {
  std::vector<Plan::DeviceStep> steps;
  for (const auto& [stream, found_inf, grad_scale] : given)
    steps.push_back({reinterpret_cast<void*>(stream), reinterpret_cast<const float*>(found_inf),
                     reinterpret_cast<const float*>(grad_scale)});
  return steps;
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
  m.def("centralised_chain_names", &fastopt::centralised_chain_names);
  m.def("instruction_set", [] { return fastopt::instruction_set().name; });
  m.def("has_cuda", [] { return fastopt::cuda_driver() != nullptr; });
  m.def("cuda_archs", &fastopt::cuda_archs);
  m.def("cuda_why_not", &fastopt::cuda_why_not);
  m.def("emulate_only_last", &fastopt::emulate_only_last);
  m.def("has_emulator", [] { return fastopt::emulator() != nullptr; });
  m.def("find_ordinary", [](py::object params) {
    const auto [found, apart] = translated([&] { return fastopt::find_ordinary(params.ptr()); });
    return py::make_tuple(py::bytes(found), apart);
  });
  m.def("find_complete", [](py::object groups, py::dict state) {
    return py::bytes(translated([&] { return fastopt::find_complete(groups.ptr(), state.ptr()); }));
  });
  m.def("drop_gradients", [](py::object groups) {
    py::list left;
    for (const fastopt::Ref& param : translated([&] { return fastopt::drop_gradients(groups.ptr()); }))
      left.append(py::handle(param.get()));
    return left;
  });
  py::class_<fastopt::Crew>(m, "Crew")  // for tests
      .def(py::init())
      .def_property_readonly("together", &fastopt::Crew::together)
      .def("note", [](fastopt::Crew& crew, int64_t n, double seconds, int threads) {
        crew.note(fastopt::Crew::Work::update, n, seconds, threads);
      });
  py::class_<Plan> plan(m, "Plan", py::custom_type_setup(collectable));
  plan.attr("step") =
      py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(plan.ptr()), &step_method));
  plan.def(py::init([](py::object hyper, py::object counters, py::object ignored, py::object intern, py::object memory,
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
             return translated(
                 [&] { return plan.gather(groups.ptr(), state.ptr(), sync.ptr()) == fastopt::Verdict::ready; });
           })
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
      .def("run",
           [](Plan& plan, py::object groups, py::object state, py::object sync, const Addresses& steps) {
             return translated([&] { return plan.run(groups.ptr(), state.ptr(), sync.ptr(), device_steps(steps)); });
           })
      .def("launch", [](Plan& plan, const Addresses& steps) { plan.launch(device_steps(steps)); });
}
