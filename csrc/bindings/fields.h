// Native functions whose arguments are the fields of a Params struct, passed by keyword:
//
//   constexpr Field<ScaleParams> kScaleFields[] = {FIELD(data), FIELD(count), ...};
//   void scale(const ScaleParams& params);
//   Function<kScaleFields, scale>::define(m, "scale");
//
//   native().scale(data=data, count=data.numel(), ...)        # Python, in any order
//
// The list of fields is the one description of the Params. FIELD makes the name and the member of the same token, and
// Python passes names, so no field can take the value of another. A field that is left out keeps its default in the
// struct, as with designated initialisers of C++. An unknown name and a positional argument raise TypeError.
// inspect.signature(native().scale) shows the names.
//
// The functions use CPython's vectorcall, because calls of small tensors take microseconds. Python passes the names as
// one constant tuple of interned strings. Where they come in the order of the list, a field costs the comparison of two
// pointers, and no dictionary is built. Keywords of pybind11 would cost 0.7 us a call.
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "illada/cuda.h"
#include "illada/error.h"

namespace illada::bindings {

namespace py = pybind11;

// A field of Params: its name in Python, and how its value is read.
template <typename Params>
struct Field {
  using Struct = Params;
  const char* name;
  void (*read)(Params& params, PyObject* value);
};

// The field of that name. FIELD_IN takes it from a part of the Params: an expression of `params`.
#define FIELD(member) FIELD_IN(params, member)
#define FIELD_IN(part, member) \
  {#member, [](auto& params, PyObject* value) { ::illada::bindings::read(value, part.member); }}

// Values. Each `read` throws error_already_set if the object has another type.

// Raises TypeError for a tensor of elements whose address is 0: one of torch's that have no memory.
inline void refuse_missing_memory(PyObject* tensor) {
  const auto number = py::reinterpret_steal<py::object>(PyObject_CallMethod(tensor, "numel", nullptr));
  if (!number) throw py::error_already_set();
  if (PyLong_AsLongLong(number.ptr()) == 0) return;
  PyErr_SetString(PyExc_TypeError, "must be a tensor with memory");
  throw py::error_already_set();
}

// Returns the address of a tensor's first element; 0 for None or an empty tensor. An integer is an address already.
inline uintptr_t read_address(PyObject* value) {
  if (value == Py_None) return 0;
  size_t address = 0;
  if (PyLong_Check(value)) {
    address = PyLong_AsSize_t(value);
  } else {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto number = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, name));
    if (!number) throw py::error_already_set();
    address = PyLong_AsSize_t(number.ptr());
    if (address == 0) refuse_missing_memory(value);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return address;
}

template <typename T>
void read(PyObject* value, T*& pointer) {
  pointer = reinterpret_cast<T*>(read_address(value));
}

inline void read(PyObject* value, bool& flag) {
  if (value != Py_True && value != Py_False) {
    PyErr_Format(PyExc_TypeError, "must be a bool, got %s", Py_TYPE(value)->tp_name);
    throw py::error_already_set();
  }
  flag = value == Py_True;
}

// Integers, and enums by their numbers.
template <typename T, std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>, int> = 0>
void read(PyObject* value, T& number) {
  const long long wide = PyLong_AsLongLong(value);  // takes __index__, refuses float
  if (wide == -1 && PyErr_Occurred()) throw py::error_already_set();
  if constexpr (sizeof(T) < sizeof wide) {
    if (wide < std::numeric_limits<int32_t>::min() || wide > std::numeric_limits<int32_t>::max()) {
      PyErr_Format(PyExc_OverflowError, "must fit 32 bits, got %lld", wide);
      throw py::error_already_set();
    }
  }
  number = static_cast<T>(wide);
}

template <typename T, std::enable_if_t<std::is_floating_point_v<T>, int> = 0>
void read(PyObject* value, T& number) {
  const double wide = PyFloat_AsDouble(value);
  if (wide == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  number = static_cast<T>(wide);
}

// Reads what native().launch(...) has made. None is the CPU: device -1.
void read(PyObject* value, CudaLaunch& launch);

// The field `workspace`: a tensor gives both the address and the bytes.
#define WORKSPACE_FIELD                                                                   \
  {"workspace", [](auto& params, PyObject* value) {                                       \
     ::illada::bindings::read_workspace(value, params.workspace, params.workspace_bytes); \
   }}
inline void read_workspace(PyObject* value, void*& workspace, int64_t& bytes) {
  if (value == Py_None) return;
  static PyObject* const name = PyUnicode_InternFromString("nbytes");
  const auto number = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, name));
  if (!number) throw py::error_already_set();
  read(value, workspace);
  read(number.ptr(), bytes);
}

// The result of a call, as a new reference.
inline PyObject* new_object(bool value) { return PyBool_FromLong(value); }
inline PyObject* new_object(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* new_object(py::object value) { return value.release().ptr(); }

// Sets the Python error of the exception that is being handled. For use in a catch block.
inline void set_python_error() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const NotSupported& error) {
    PyErr_SetString(PyExc_NotImplementedError, error.what());
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::logic_error& error) {  // illada::Error
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {  // CudaError
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

// The Python function that reads Params from keywords by `kFields` and calls `kCall` with them.
template <const auto& kFields, auto kCall>
class Function {
 public:
  static void define(py::module_& m, const char* name) {
    name_ = name;
    doc_ = std::string(name) + "($module, /, *";
    for (size_t i = 0; i < kCount; ++i) {
      names_[i] = PyUnicode_InternFromString(kFields[i].name);
      doc_ += std::string(", ") + kFields[i].name + "=...";
    }
    doc_ += ")\n--\n\n";
    method_[0] = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                  METH_FASTCALL | METH_KEYWORDS, doc_.c_str()};
    if (PyModule_AddFunctions(m.ptr(), method_) != 0) throw py::error_already_set();
  }

 private:
  using Params = typename std::remove_reference_t<decltype(kFields[0])>::Struct;
  static constexpr size_t kCount = std::size(kFields);

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    try {
      Params params;
      if (positional != 0) {
        PyErr_Format(PyExc_TypeError, "%s() takes keyword arguments only", name_);
        throw py::error_already_set();
      }
      const Py_ssize_t given = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
      size_t next = 0;
      for (Py_ssize_t i = 0; i < given; ++i) {
        const size_t at = find(PyTuple_GET_ITEM(keywords, i), next);
        next = at + 1;
        read_field(params, at, values[i]);
      }
      if constexpr (std::is_void_v<decltype(kCall(params))>) {
        kCall(params);
        Py_RETURN_NONE;
      } else {
        return new_object(kCall(params));
      }
    } catch (...) {
      set_python_error();
      return nullptr;
    }
  }

  // Returns the index of the field, searching from `first` on. Names are interned, so equal ones are mostly identical.
  static size_t find(PyObject* name, size_t first) {
    for (size_t i = first; i < kCount; ++i)
      if (names_[i] == name) return i;
    for (size_t i = 0; i < kCount; ++i)
      if (names_[i] == name || PyUnicode_Compare(names_[i], name) == 0) return i;
    PyErr_Format(PyExc_TypeError, "%s() has no argument '%U'", name_, name);
    throw py::error_already_set();
  }

  static void read_field(Params& params, size_t at, PyObject* value) {
    try {
      kFields[at].read(params, value);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_OverflowError)) throw;
      const std::string message = std::string(name_) + "(): " + kFields[at].name;
      py::raise_from(error, PyExc_TypeError, message.c_str());
      throw py::error_already_set();
    }
  }

  static inline const char* name_ = nullptr;
  static inline std::string doc_;
  static inline PyObject* names_[kCount] = {};
  static inline PyMethodDef method_[2] = {};
};

}  // namespace illada::bindings
