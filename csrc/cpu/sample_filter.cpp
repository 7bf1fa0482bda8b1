// The row kernel runs over all logits for the confidence, and over the kept logits for the token. With
// confidence_at_temperature it runs a third time, over the kept logits divided by the temperature, for the confidence.
// Additional cost: a float32 copy of the row, a selection for top_k, and one exponential per id for top_p.
#include "cpu/sample_filter.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

namespace illada::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Returns the k-th largest logit, the smallest that top_k keeps. All logits equal to it are kept as well.
float kth_largest(const std::vector<float>& x, int64_t k) {
  std::vector<float> order(x);
  std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
  return order[size_t(k - 1)];
}

// Sets the logits that top_p does not keep to -inf. It first sums the probabilities of neighbouring logits in bins, so
// that it sorts the logits of one bin only.
void keep_top_p(std::vector<float>& x, float maximum, float temperature, float top_p) {
  constexpr int kBins = 2048;
  constexpr double kBinsPerNat = 64;  // bins per factor e in probability
  const auto nats_below = [&](float value) { return (double(maximum) - double(value)) / double(temperature); };
  const auto bin_of = [&](float value) { return int(std::min(nats_below(value) * kBinsPerNat, double(kBins - 1))); };
  std::vector<double> mass(kBins, 0.0);
  double total = 0;
  for (const float value : x)
    if (value > -kInfinity) mass[size_t(bin_of(value))] += std::exp(-nats_below(value));
  for (const double part : mass) total += part;
  const double target = double(top_p) * total;
  double sum = 0;
  int last_bin = 0;
  while (last_bin < kBins - 1 && sum + mass[size_t(last_bin)] < target) sum += mass[size_t(last_bin++)];

  std::vector<std::pair<float, int64_t>> bin_entries;
  for (size_t v = 0; v < x.size(); ++v) {
    if (x[v] == -kInfinity) continue;
    const int bin = bin_of(x[v]);
    if (bin == last_bin) bin_entries.emplace_back(x[v], int64_t(v));
    if (bin > last_bin) x[v] = -kInfinity;
  }
  std::sort(bin_entries.begin(), bin_entries.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  for (size_t i = 0; i < bin_entries.size(); ++i) {
    if (sum >= target) x[size_t(bin_entries[i].second)] = -kInfinity;
    sum += std::exp(-nats_below(bin_entries[i].first));
  }
}

std::vector<float> biased_logits(const SampleRow& row, bool bf16, const RowKernels& kernels) {
  std::vector<float> x(size_t(row.vocab_size));
  const auto logit = bf16 ? kernels.logit_bf16 : kernels.logit_f32;
  for (size_t v = 0; v < x.size(); ++v) x[v] = logit(row.logits, int64_t(v));
  for (int64_t b = 0; b < row.bias_count; ++b)
    if (row.bias_ids[b] >= 0) x[size_t(row.bias_ids[b])] += row.bias_values[b];
  return x;
}

}  // namespace

SampleRowResult sample_filtered(const RowKernels& kernels, bool bf16, const SampleRow& row, const RowFilter& filter) {
  SampleRow greedy = row;  // its token is the most likely one
  greedy.temperature = 0;
  SampleRowResult found = (bf16 ? kernels.sample_bf16 : kernels.sample_f32)(greedy);
  if (!found.valid) return (bf16 ? kernels.sample_bf16 : kernels.sample_f32)(row);

  std::vector<float> x = biased_logits(row, bf16, kernels);
  const float maximum = x[size_t(found.token)], temperature = row.temperature > 0 ? row.temperature : 1.0f;
  if (filter.top_k > 0 && filter.top_k < row.vocab_size) {
    const float last = kth_largest(x, filter.top_k);
    for (float& value : x)
      if (value < last) value = -kInfinity;
  }
  if (filter.top_p < 1.0f) keep_top_p(x, maximum, temperature, filter.top_p);

  SampleRow kept = row;
  kept.logits = x.data();
  kept.bias_count = 0;
  const int64_t token = kernels.sample_f32(kept).token;
  double logit = double(x[size_t(token)]) - double(maximum);
  if (filter.confidence_at_temperature) {
    for (float& value : x) value = (value - maximum) / temperature;
    kept.temperature = 0;
    logit = double(x[size_t(token)]);
    found = kernels.sample_f32(kept);
  }
  found.token = token;
  found.logprob = float(logit + double(found.logprob));  // before this, the logprob of the largest logit
  return found;
}

}  // namespace illada::cpu
