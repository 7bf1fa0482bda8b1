#include "bindings/torch_tensors.h"

#include <algorithm>
#include <atomic>
#include <memory>

namespace py = pybind11;

namespace illada::bindings {
namespace {

// DLPackExchangeAPI of DLPack 1: only `read` is used.
struct DlExchange {
  uint32_t major, minor;
  void *previous, *allocate, *from_tensor, *to_tensor;
  int (*read)(void* tensor, DlTensor* out);
};

constexpr int kDlCpu = 1;

std::atomic<const Torch*> the_torch = nullptr;

}  // namespace

bool View::has_shape(std::initializer_list<int64_t> shape) const {
  if (dims() != int(shape.size())) return false;
  int dim = 0;
  for (const int64_t wanted : shape) {
    if (size(dim++) != wanted) return false;
  }
  return true;
}

int64_t View::elements() const {
  int64_t count = 1;
  for (int dim = 0; dim < dims(); ++dim) count *= size(dim);
  return count;
}

bool View::is_contiguous() const {
  int64_t expected = 1;
  bool matches = true;
  for (int dim = dims() - 1; dim >= 0; --dim) {
    if (size(dim) == 0) return true;
    matches = matches && (size(dim) == 1 || stride(dim) == expected);
    expected *= size(dim);
  }
  return matches;
}

void use_torch(py::handle torch, uint64_t keys_of_every_call) {
  const py::object tensor = torch.attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) return;
  const auto* table = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table) throw py::error_already_set();
  if (table->major != 1 || !table->read) return;
  // Kept until the process ends, as the module is.
  const auto kept = [](const py::object& object) { return py::object(object).release().ptr(); };
  auto all = std::make_unique<Torch>();
  all->read = table->read;
  all->tensor = kept(tensor);
  all->parameter = kept(torch.attr("nn").attr("Parameter"));
  const auto elements = [&](const char* name) {
    const py::object dtype = torch.attr(name);
    return Elements{kept(dtype), kept(torch.attr("empty")(0, py::arg("dtype") = dtype, py::arg("device") = "cpu"))};
  };
  all->float32 = elements("float32");
  all->bfloat16 = elements("bfloat16");
  all->int64 = elements("int64");
  all->mm = kept(torch.attr("mm"));
  all->linear = kept(torch.attr("nn").attr("functional").attr("linear"));
  all->get_num_threads = kept(torch.attr("get_num_threads"));
  const py::object native = torch.attr("_C");
  all->keys_added = kept(native.attr("_dispatch_tls_local_include_set"));
  all->function_modes = kept(native.attr("_len_torch_function_stack"));
  all->is_profiled = kept(torch.attr("autograd").attr("_profiler_enabled"));
  all->is_autocast_enabled = kept(torch.attr("is_autocast_enabled"));
  all->names_of_forward_ad = kept(torch.attr("autograd").attr("forward_ad").attr("__dict__"));
  all->cpu = kept(py::str("cpu"));
  all->keys_of_every_call = keys_of_every_call;
  the_torch = all.release();
}

bool is_watched() {
  static PyObject* const raw_repr = PyUnicode_InternFromString("raw_repr");
  static PyObject* const level = PyUnicode_InternFromString("_current_level");
  const Torch* torch = bindings::torch();
  if (!torch) return true;
  const py::object keys = call(torch->keys_added, {});
  const auto raw = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(keys.ptr(), raw_repr));
  if (!raw) throw py::error_already_set();
  if (PyLong_AsUnsignedLongLong(raw.ptr()) != torch->keys_of_every_call) return true;
  PyObject* const forward_ad = PyDict_GetItemWithError(torch->names_of_forward_ad, level);
  if (!forward_ad || PyLong_AsLong(forward_ad) >= 0) return true;
  return PyLong_AsLong(call(torch->function_modes, {}).ptr()) != 0 || call(torch->is_profiled, {}).ptr() == Py_True ||
         call(torch->is_autocast_enabled, {torch->cpu}).ptr() == Py_True;
}

const Torch* torch() { return the_torch.load(std::memory_order_acquire); }

std::optional<View> view(py::handle tensor) {
  const Torch* torch = bindings::torch();
  if (!torch) return std::nullopt;
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (type != torch->tensor && type != torch->parameter) return std::nullopt;
  DlTensor read;
  if (torch->read(tensor.ptr(), &read) != 0) {  // sparse, or without memory
    PyErr_Clear();
    return std::nullopt;
  }
  if (read.device_type != kDlCpu) return std::nullopt;
  const View seen(read);
  if (!read.data && seen.elements() != 0) return std::nullopt;
  return seen;
}

bool is_negated(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

bool requires_grad(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const auto result = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

// new_empty_strided is the fastest of torch's calls that allocate: it has one signature, and needs no keywords.
NewTensor new_tensor(std::initializer_list<int64_t> shape, const Elements& elements) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty_strided");
  py::tuple sizes(shape.size()), strides(shape.size());
  int64_t stride = 1;
  auto dim = Py_ssize_t(shape.size());
  for (const int64_t* size = shape.end(); size != shape.begin();) {
    --size;
    --dim;
    PyTuple_SET_ITEM(sizes.ptr(), dim, PyLong_FromLongLong(*size));
    PyTuple_SET_ITEM(strides.ptr(), dim, PyLong_FromLongLong(stride));
    stride *= std::max<int64_t>(*size, 1);
  }
  PyObject* const arguments[] = {elements.like, sizes.ptr(), strides.ptr()};
  NewTensor made{py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name, arguments, 3, nullptr)), nullptr};
  if (!made.tensor) throw py::error_already_set();
  const std::optional<View> seen = view(made.tensor);
  if (!seen || !seen->is_contiguous()) throw NotPlain();
  made.address = seen->data<void>();
  return made;
}

int num_threads() {
  const py::object number = call(torch()->get_num_threads, {});
  return int(PyLong_AsLong(number.ptr()));
}

py::object call(PyObject* function, std::initializer_list<py::handle> arguments) {
  static_assert(sizeof(py::handle) == sizeof(PyObject*));
  auto result = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(function, reinterpret_cast<PyObject* const*>(arguments.begin()), arguments.size(), nullptr));
  if (!result) throw py::error_already_set();
  return result;
}

}  // namespace illada::bindings
