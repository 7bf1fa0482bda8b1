// Reads and makes torch's CPU tensors without torch's headers. Attributes such as shape and stride() cost 0.1 us each
// in Python. DLPack's exchange table, which torch 2.10 and newer have, gives all of them in one call of C.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "cpu/dtypes.h"
#include "illada/dtype.h"

namespace illada::bindings {

// DLTensor of DLPack 1.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// A CPU tensor, valid while the tensor lives.
class View {
 public:
  explicit View(const DlTensor& tensor) : tensor_(tensor) {}

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
  }
  int dims() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  int64_t stride(int dim) const { return tensor_.strides[dim]; }
  bool has_shape(std::initializer_list<int64_t> shape) const;
  int64_t elements() const;
  bool is_contiguous() const;
  bool last_is_contiguous() const { return size(dims() - 1) <= 1 || stride(dims() - 1) == 1; }

  bool is_float32() const { return is(kFloat, 32); }
  bool is_bfloat16() const { return is(kBfloat, 16); }
  bool is_float16() const { return is(kFloat, 16); }
  bool is_int32() const { return is(kInt, 32); }
  bool is_int64() const { return is(kInt, 64); }
  bool has_type_of(const View& other) const { return is(other.tensor_.type_code, other.tensor_.type_bits); }
  // True for the types of logits and activations for which there are CPU kernels.
  bool is_activation() const { return (is_float32() || is_bfloat16() || is_float16()) && cpu::has_kernels(dtype()); }
  // Its type, which must be one of DType.
  DType dtype() const { return is_float32() ? DType::kFloat32 : is_bfloat16() ? DType::kBFloat16 : DType::kFloat16; }

 private:
  static constexpr int kInt = 0, kFloat = 2, kBfloat = 4;  // DLDataTypeCode
  bool is(int code, int bits) const {
    return tensor_.type_code == code && tensor_.type_bits == bits && tensor_.type_lanes == 1;
  }

  DlTensor tensor_;
};

// A type of elements: torch's dtype and an empty CPU tensor of it, which makes others.
struct Elements {
  PyObject *dtype = nullptr, *like = nullptr;
};

// What these files use of torch.
struct Torch {
  int (*read)(void* tensor, DlTensor* out) = nullptr;  // of DLPack's table; sets a Python error where it fails
  PyObject *tensor = nullptr, *parameter = nullptr;    // types
  Elements float32, bfloat16, int64;
  PyObject *mm = nullptr, *linear = nullptr, *get_num_threads = nullptr;
  // What is_watched asks.
  PyObject *keys_added = nullptr, *function_modes = nullptr, *is_profiled = nullptr, *is_autocast_enabled = nullptr;
  PyObject *names_of_forward_ad = nullptr, *cpu = nullptr;
  uint64_t keys_of_every_call = 0;

  // For the dtypes that have CPU kernels.
  const Elements& of(DType dtype) const { return dtype == DType::kFloat32 ? float32 : bfloat16; }
};

// Reads what is needed of torch, once. Without DLPack's table, torch() stays null. keys_of_every_call are the dispatch
// keys that a thread adds to each call.
void use_torch(pybind11::handle torch, uint64_t keys_of_every_call);
const Torch* torch();

// True where a call of an op on CPU tensors must go through torch's dispatcher: in tracing, modes, transforms,
// forward-mode AD, autocast and under a profiler. Also true without torch(). Does not ask for torch.compile. It is
// `watched` of python/illada/ops/_library.py with autocast: a condition added to one belongs in the other.
bool is_watched();

// The view of a tensor: of torch's own types, on the CPU. Empty for all others, and without DLPack's table.
std::optional<View> view(pybind11::handle tensor);

// True for a tensor whose memory holds the negated values; views cannot tell.
bool is_negated(pybind11::handle tensor);
bool requires_grad(pybind11::handle tensor);

// Thrown where torch returned what is no plain CPU tensor: a mode of the caller has replaced the call.
struct NotPlain {};

// A new, uninitialised CPU tensor and its elements. Throws NotPlain.
struct NewTensor {
  pybind11::object tensor;
  void* address;
};
NewTensor new_tensor(std::initializer_list<int64_t> shape, const Elements& elements);

// torch.get_num_threads()
int num_threads();

// Calls a Python function of positional arguments.
pybind11::object call(PyObject* function, std::initializer_list<pybind11::handle> arguments);

}  // namespace illada::bindings
