// The exceptions of the C++ API. For a caller's mistake, illada never prints, asserts or exits.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace illada {

// An invalid call. The message names the op, the argument, the value received and the values allowed.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A valid call for which there is no kernel: the GPU, the dtype or the shape is not supported.
class NotSupported : public Error {
 public:
  using Error::Error;
};

// A failed CUDA call. The message names the op, what it did, the shape of a launch, and CUDA's name and text of the
// error.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {
template <typename Exception = Error, typename... Parts>
[[noreturn]] void fail(const char* op, Parts&&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << std::forward<Parts>(parts));
  throw Exception(message.str());
}
}  // namespace detail

}  // namespace illada

// Throws Error unless `condition` holds. Example:
// ILLADA_CHECK(n >= 0, "remask", "num_rows must not be negative, got ", n);
#define ILLADA_CHECK(condition, op, ...)                       \
  do {                                                         \
    if (!(condition)) ::illada::detail::fail(op, __VA_ARGS__); \
  } while (0)
