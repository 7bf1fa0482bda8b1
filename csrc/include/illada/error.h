// The exceptions of the C++ API. Nothing in illada prints, asserts or exits for a caller's mistake.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace illada {

// A call that cannot be carried out: which op, which argument, what was got, what is allowed.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A legal call for which nothing was built: this GPU, this dtype, this shape.
class NotSupported : public Error {
 public:
  using Error::Error;
};

// CUDA refused a call: which op, what it did, the shape of a launch, and the error's name and text as CUDA has them.
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

// ILLADA_CHECK(n >= 0, "remask", "num_rows must not be negative, got ", n);
#define ILLADA_CHECK(condition, op, ...)                       \
  do {                                                         \
    if (!(condition)) ::illada::detail::fail(op, __VA_ARGS__); \
  } while (0)
