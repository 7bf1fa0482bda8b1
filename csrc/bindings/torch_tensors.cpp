#include "bindings/torch_tensors.h"

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

void use_torch(py::handle torch) {
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
  all->float32 = kept(torch.attr("float32"));
  all->bfloat16 = kept(torch.attr("bfloat16"));
  all->int64 = kept(torch.attr("int64"));
  all->empty = kept(torch.attr("empty"));
  all->mm = kept(torch.attr("mm"));
  all->linear = kept(torch.attr("nn").attr("functional").attr("linear"));
  all->get_num_threads = kept(torch.attr("get_num_threads"));
  all->cpu = kept(torch.attr("device")("cpu"));
  all->names_of_empty = kept(py::make_tuple("dtype", "device"));
  the_torch = all.release();
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
  if (!read.data) {
    int64_t elements = 1;
    for (int dim = 0; dim < read.ndim; ++dim) elements *= read.shape[dim];
    if (elements != 0) return std::nullopt;
  }
  return View(read);
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

NewTensor new_tensor(std::initializer_list<int64_t> shape, PyObject* dtype) {
  const Torch* torch = bindings::torch();
  py::tuple sizes(shape.size());
  Py_ssize_t dim = 0;
  for (const int64_t size : shape) PyTuple_SET_ITEM(sizes.ptr(), dim++, PyLong_FromLongLong(size));
  PyObject* const arguments[] = {sizes.ptr(), dtype, torch->cpu};
  NewTensor made{
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch->empty, arguments, 1, torch->names_of_empty)),
      nullptr};
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
