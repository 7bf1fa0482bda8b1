// Choices between instances of the CUDA kernels. Only a measurement on a GPU can decide them. They exist only in builds
// with CUDA.
#pragma once

#include <string>
#include <vector>

namespace illada {

// One choice. All its values give correct results and differ in speed.
struct Variant {
  std::string name;         // name, such as "attention_backward_sums"
  std::string environment;  // environment variable that sets it, such as "ILLADA_VARIANT_ATTENTION_BACKWARD_SUMS"
  std::string description;  // description of one line
  std::vector<std::string> values;  // allowed values; the first is the default
  std::string value;                // value in use
};

// Returns all choices, in a fixed order. Throws Error if an environment variable holds a value that is not allowed.
std::vector<Variant> variants();

// Sets `value` for all later calls of this process, in all threads. An empty value restores the environment variable's
// value or the default. Workspace sizes depend on the choice: query them again. Attention plans stay valid, but keep
// the load balance and key splits of the choice they were made with. Throws Error for an unknown name or value.
void set_variant(const std::string& name, const std::string& value);

}  // namespace illada
