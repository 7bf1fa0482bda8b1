// Choices between instances of the CUDA kernels that only a measurement on a GPU can make. In builds with CUDA alone.
#pragma once

#include <string>
#include <vector>

namespace illada {

// One choice. All values give correct results; they differ in speed.
struct Variant {
  std::string name;                 // "attention_backward_sums"
  std::string environment;          // the variable that chooses: "ILLADA_VARIANT_ATTENTION_BACKWARD_SUMS"
  std::string description;          // one line
  std::vector<std::string> values;  // allowed; the first one is the default
  std::string value;                // in use
};

// All choices, in a fixed order. Throws Error if an environment variable holds a value that is not allowed.
std::vector<Variant> variants();

// Uses `value` for all later calls of this process, in all threads; an empty value goes back to the environment's or
// the default. Workspace sizes depend on it: ask for them again. Plans of attention stay valid, but balance and splits
// are those of the choice they were made with. Throws Error for an unknown name or value.
void set_variant(const std::string& name, const std::string& value);

}  // namespace illada
