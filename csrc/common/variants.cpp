#include "common/variants.h"

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "illada/error.h"

namespace illada {
namespace {

struct Entry {
  const char* name;
  const char* environment;
  const char* description;
  std::vector<const char*> values;
  std::atomic<int> chosen{kUnset};

  static constexpr int kUnset = -1;  // the environment has not been looked at

  int index_of(const char* source, const std::string& value) const {
    std::string allowed;
    for (size_t i = 0; i < values.size(); ++i) {
      if (value == values[i]) return int(i);
      allowed += (i ? ", " : "") + std::string(values[i]);
    }
    detail::fail(source, "got \"", value, "\"; allowed are ", allowed);
  }
  int value() {
    int index = chosen.load(std::memory_order_relaxed);
    if (index == kUnset) {
      const char* const wanted = std::getenv(environment);
      index = wanted && *wanted ? index_of(environment, wanted) : 0;
      chosen.store(index, std::memory_order_relaxed);
    }
    return index;
  }
};

// Defined before its first use in any thread: a function's static.
template <typename Choice>
Entry& entry();

template <>
Entry& entry<ProgrammaticLaunch>() {
  static Entry it{"pdl",
                  "ILLADA_PDL",
                  "programmatic dependent launch: the next kernel is scheduled early, when this one ends, or never",
                  {"early", "wait", "0"}};
  return it;
}

template <>
Entry& entry<ForwardWarps>() {
  static Entry it{
      "attention_forward_warps",
      "ILLADA_VARIANT_ATTENTION_FORWARD_WARPS",
      "warps of a CTA of the sm_80 attention forward of D 128; auto: 8 where two CTAs of 4 do not fit an SM",
      {"auto", "4", "8"}};
  return it;
}

std::vector<Entry*> entries() { return {&entry<ProgrammaticLaunch>(), &entry<ForwardWarps>()}; }

}  // namespace

template <typename Choice>
Choice variant() {
  return Choice(entry<Choice>().value());
}
template ProgrammaticLaunch variant<ProgrammaticLaunch>();
template ForwardWarps variant<ForwardWarps>();

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (Entry* entry : entries())
    all.push_back({entry->name,
                   entry->environment,
                   entry->description,
                   {entry->values.begin(), entry->values.end()},
                   entry->values[size_t(entry->value())]});
  return all;
}

void set_variant(const std::string& name, const std::string& value) {
  std::string allowed;
  for (Entry* entry : entries()) {
    if (name == entry->name) {
      entry->chosen = value.empty() ? Entry::kUnset : entry->index_of(entry->name, value);
      return;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(entry->name);
  }
  detail::fail("set_variant", "there is no choice \"", name, "\"; there are ", allowed);
}

}  // namespace illada
