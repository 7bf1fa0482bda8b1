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
  static Entry it{
      "pdl",
      "ILLADA_PDL",
      "programmatic dependent launch: the next kernel is scheduled when this one ends, early, or without overlap",
      {"wait", "early", "0"}};
  return it;
}

template <>
Entry& entry<L2Hints>() {
  static Entry it{"l2_hints",
                  "ILLADA_VARIANT_L2_HINTS",
                  "attention: cache hints that keep in L2 what is read again and let go what is not",
                  {"off", "on"}};
  return it;
}

template <>
Entry& entry<AttentionForwardD128>() {
  static Entry it{"attention_forward_d128",
                  "ILLADA_VARIANT_ATTENTION_FORWARD_D128",
                  "attention forward, sm_90a, head dim 128: keys of a tile x stages of keys x stages of values",
                  {"128x2x3", "128x2x2", "176x2x2"}};
  return it;
}

template <>
Entry& entry<AttentionForwardD64>() {
  static Entry it{"attention_forward_d64",
                  "ILLADA_VARIANT_ATTENTION_FORWARD_D64",
                  "attention forward, sm_90a, head dim 64: rows x keys of a tile",
                  {"192x96", "192x128"}};
  return it;
}

template <>
Entry& entry<AttentionCluster>() {
  static Entry it{"attention_cluster",
                  "ILLADA_VARIANT_ATTENTION_CLUSTER",
                  "attention forward, sm_90a: pairs of CTAs share loads of keys where there are tiles enough, or never",
                  {"auto", "1"}};
  return it;
}

template <>
Entry& entry<ForwardWarps>() {
  static Entry it{
      "attention_forward_warps",
      "ILLADA_VARIANT_ATTENTION_FORWARD_WARPS",
      "warps of a CTA of the sm_80 attention forward of D 128; auto: 8 where two CTAs of 4 do not fit an SM; at D 256, "
      "which always has 8 warps: 32 keys per step (4; 16 where 32 do not fit an SM) or 16 (8)",
      {"auto", "4", "8"}};
  return it;
}

template <>
Entry& entry<AttentionBackwardSums>() {
  static Entry it{"attention_backward_sums",
                  "ILLADA_VARIANT_ATTENTION_BACKWARD_SUMS",
                  "sm_90a, dq: fp32 sums by 8- or 16-byte reductions or by TMA, or no sums but recomputed scores",
                  {"red2", "red4", "bulk", "recompute"}};
  return it;
}

template <>
Entry& entry<AttentionBackwardStart>() {
  static Entry it{"attention_backward_start",
                  "ILLADA_VARIANT_ATTENTION_BACKWARD_START",
                  "sm_90a: tiles of keys begin at the same rows, or each elsewhere, so that they add to other lines",
                  {"together", "staggered"}};
  return it;
}

template <>
Entry& entry<AttentionBackwardReports>() {
  static Entry it{"attention_backward_reports",
                  "ILLADA_VARIANT_ATTENTION_BACKWARD_REPORTS",
                  "sm_90a: after how many steps a CTA reports what it has added to dq",
                  {"1", "2", "4"}};
  return it;
}

template <>
Entry& entry<SampleTokensLoads>() {
  static Entry it{"sample_tokens",
                  "ILLADA_VARIANT_SAMPLE_TOKENS",
                  "16-bit logits on their way to an SM: 32 KB to registers, or 64 or 128 KB to shared memory",
                  {"registers_32k", "shared_64k", "shared_128k"}};
  return it;
}

template <>
Entry& entry<LossGradients>() {
  static Entry it{"loss_gradients",
                  "ILLADA_VARIANT_LOSS_GRADIENTS",
                  "the gradient GEMMs of linear_masked_cross_entropy on sm_90a: our own, or torch.mm (from Python)",
                  {"fused", "mm"}};
  return it;
}

template <>
Entry& entry<LossOrder>() {
  static Entry it{"loss_order",
                  "ILLADA_VARIANT_LOSS_ORDER",
                  "which gradient of linear_masked_cross_entropy is made first from a chunk's probabilities",
                  {"hidden_first", "weight_first"}};
  return it;
}

template <>
Entry& entry<LossRaster>() {
  static Entry it{
      "loss_raster",
      "ILLADA_VARIANT_LOSS_RASTER",
      "linear_masked_cross_entropy, logits and weight gradient: tiles that share a stretch of the vocabulary and "
      "are made together, all or groups that need less of the L2 cache",
      {"all", "8", "4"}};
  return it;
}

std::vector<Entry*> entries() {
  return {&entry<ProgrammaticLaunch>(),
          &entry<L2Hints>(),
          &entry<AttentionForwardD128>(),
          &entry<AttentionForwardD64>(),
          &entry<AttentionCluster>(),
          &entry<ForwardWarps>(),
          &entry<AttentionBackwardSums>(),
          &entry<AttentionBackwardStart>(),
          &entry<AttentionBackwardReports>(),
          &entry<LossGradients>(),
          &entry<LossOrder>(),
          &entry<LossRaster>(),
          &entry<SampleTokensLoads>()};
}

}  // namespace

template <typename Choice>
Choice variant() {
  return Choice(entry<Choice>().value());
}
template ProgrammaticLaunch variant<ProgrammaticLaunch>();
template L2Hints variant<L2Hints>();
template AttentionForwardD128 variant<AttentionForwardD128>();
template AttentionForwardD64 variant<AttentionForwardD64>();
template AttentionCluster variant<AttentionCluster>();
template ForwardWarps variant<ForwardWarps>();
template AttentionBackwardSums variant<AttentionBackwardSums>();
template AttentionBackwardStart variant<AttentionBackwardStart>();
template AttentionBackwardReports variant<AttentionBackwardReports>();
template LossGradients variant<LossGradients>();
template LossOrder variant<LossOrder>();
template LossRaster variant<LossRaster>();
template SampleTokensLoads variant<SampleTokensLoads>();

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
