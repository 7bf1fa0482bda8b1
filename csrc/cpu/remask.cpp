#include "illada/remask.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/philox.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "cpu/sample_filter.h"
#include "illada/error.h"

namespace illada::remask {
namespace {

void validate(const SampleTokensParams& p) {
  constexpr const char* kOp = "sample_tokens";
  cpu::check_logits_dtype(kOp, p.dtype);
  ILLADA_CHECK(p.num_rows >= 0, kOp, "num_rows must not be negative, got ", p.num_rows);
  ILLADA_CHECK(p.vocab_size > 0 && p.vocab_size <= std::numeric_limits<int32_t>::max(), kOp,
               "vocab_size must be in [1, 2^31), got ", p.vocab_size);
  ILLADA_CHECK(p.logits_row_stride >= 0, kOp, "logits row stride must not be negative, got ", p.logits_row_stride);
  ILLADA_CHECK(p.num_rows == 0 || (p.logits && p.token && p.confidence && p.logprob), kOp,
               "logits, token, confidence and logprob must not be null");
  ILLADA_CHECK(p.num_rows == 0 || p.bias_count == 0 || (p.bias_ids && p.bias_values), kOp,
               "logit_bias ids and values must not be null");
  for (int64_t n = 0; n < p.num_rows; ++n) {
    const float temperature = p.temperatures ? p.temperatures[n] : p.temperature;
    ILLADA_CHECK(temperature >= 0 && std::isfinite(temperature), kOp, "temperature must be finite and >= 0, got ",
                 temperature, " in row ", n);
    const int64_t top_k = p.top_ks ? p.top_ks[n] : p.top_k;
    ILLADA_CHECK(top_k >= 0, kOp, "top_k must be at least 0, got ", top_k, " in row ", n);
    const float top_p = p.top_ps ? p.top_ps[n] : p.top_p;
    ILLADA_CHECK(top_p > 0 && top_p <= 1, kOp, "top_p must be in (0, 1], got ", top_p, " in row ", n);
    const int64_t row_id = p.row_ids ? p.row_ids[n] : n;
    ILLADA_CHECK(row_id >= 0 && row_id < (int64_t(1) << 32), kOp, "row_ids must be in [0, 2^32), got ", row_id,
                 " in row ", n);
    for (int64_t b = 0; b < p.bias_count; ++b) {
      const int32_t id = p.bias_ids[n * p.bias_row_stride + b];
      ILLADA_CHECK(id >= -1 && id < p.vocab_size, kOp, "logit_bias id ", id, " in row ", n, " is outside of [-1, ",
                   p.vocab_size, ")");
    }
  }
}

void validate(const RemaskParams& p) {
  constexpr const char* kOp = "remask";
  ILLADA_CHECK(p.num_rows >= 0 && p.num_sequences >= 0, kOp, "negative size: ", p.num_rows, " rows, ", p.num_sequences,
               " sequences");
  ILLADA_CHECK(p.cu_rows != nullptr, kOp, "cu_rows must not be null");
  ILLADA_CHECK(p.num_sequences == 0 || p.committed, kOp, "committed must not be null");
  ILLADA_CHECK(p.num_rows == 0 || (p.tokens && p.rows && p.token && p.confidence), kOp,
               "tokens, rows and the sample must not be null");
  ILLADA_CHECK(p.rule != Rule::kEntropyBound || p.entropy || p.num_rows == 0, kOp,
               "entropy_bound needs a sample with entropies");
  ILLADA_CHECK(p.num_end_ids == 0 || p.end_ids, kOp, "end_ids must not be null");
  ILLADA_CHECK(p.min_commit >= 0, kOp, "min_commit must not be negative, got ", p.min_commit);
  ILLADA_CHECK(p.cu_rows[0] == 0 && p.cu_rows[p.num_sequences] == p.num_rows, kOp, "cu_rows must run from 0 to ",
               p.num_rows, ", got ", p.cu_rows[0], " to ", p.cu_rows[p.num_sequences]);
  for (int64_t s = 0; s < p.num_sequences; ++s)
    ILLADA_CHECK(p.cu_rows[s] <= p.cu_rows[s + 1], kOp, "cu_rows must ascend, got ", p.cu_rows[s], " before ",
                 p.cu_rows[s + 1], " at index ", s);
  for (int64_t n = 0; n < p.num_rows; ++n)
    ILLADA_CHECK(p.rows[n] >= 0 && p.rows[n] < p.num_tokens, kOp, "rows[", n, "] is ", p.rows[n], ", outside of [0, ",
                 p.num_tokens, ")");
  for (int64_t n = 0; n < p.num_rows && !p.tokens_are_int64; ++n)
    ILLADA_CHECK(p.token[n] == int32_t(p.token[n]), kOp, "sample.token[", n, "] is ", p.token[n],
                 ", which int32 tokens cannot hold");
}

// Returns how many of the ranked candidates the rule commits.
int64_t count_by_rule(const RemaskParams& p, int64_t s, const std::vector<int64_t>& ranked) {
  const int64_t candidates = int64_t(ranked.size());
  if (p.rule == Rule::kQuota) {
    if (p.limits) return std::clamp<int64_t>(static_cast<const int32_t*>(p.limits)[s], 0, candidates);
    // Compare before the conversion, because an integer holds neither infinity nor 1e30.
    return p.limit >= float(candidates) ? candidates : p.limit > 0 ? int64_t(p.limit) : 0;
  }
  const float limit = p.limits ? static_cast<const float*>(p.limits)[s] : p.limit;
  int64_t count = 0;
  double entropies = 0;
  switch (p.rule) {
    case Rule::kQuota:
      break;
    case Rule::kThreshold:
      while (count < candidates && p.confidence[ranked[count]] >= limit) ++count;
      break;
    case Rule::kFactor:
      // Rank r = count + 1.
      while (count < candidates && p.confidence[ranked[count]] > 1.0 - double(limit) / double(count + 2)) ++count;
      break;
    case Rule::kEntropyBound:
      // Entropies ascend, so the largest of a prefix is its last. The sum without it is the sum before it.
      while (count < candidates && entropies <= limit) entropies += p.entropy[ranked[count++]];
      break;
  }
  return std::min(std::max(count, p.min_commit), candidates);
}

template <typename Token>
void remask_sequence(const RemaskParams& p, Token* tokens, int64_t s) {
  std::vector<int64_t> ranked;
  for (int64_t n = p.cu_rows[s]; n < p.cu_rows[s + 1]; ++n) {
    // A NaN entropy has no rank.
    const bool has_rank = p.rule != Rule::kEntropyBound || !std::isnan(p.entropy[n]);
    if (tokens[p.rows[n]] == p.mask_id && p.confidence[n] > -std::numeric_limits<float>::infinity() && has_rank)
      ranked.push_back(n);
  }
  if (p.rule == Rule::kEntropyBound) {
    std::sort(ranked.begin(), ranked.end(),
              [&](int64_t a, int64_t b) { return p.entropy[a] != p.entropy[b] ? p.entropy[a] < p.entropy[b] : a < b; });
  } else {
    std::sort(ranked.begin(), ranked.end(), [&](int64_t a, int64_t b) {
      return p.confidence[a] != p.confidence[b] ? p.confidence[a] > p.confidence[b] : a < b;
    });
  }
  const int64_t count = count_by_rule(p, s, ranked);
  bool ended = false;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t token = p.token[ranked[r]];
    tokens[p.rows[ranked[r]]] = Token(token);
    ended |= std::find(p.end_ids, p.end_ids + p.num_end_ids, token) != p.end_ids + p.num_end_ids;
  }
  p.committed[s] = int32_t(count);
  if (p.ended) p.ended[s] = ended;
  int32_t remaining = 0;
  for (int64_t n = p.cu_rows[s]; n < p.cu_rows[s + 1]; ++n) remaining += tokens[p.rows[n]] == p.mask_id;
  if (p.remaining) p.remaining[s] = remaining;
  if (p.finished) p.finished[s] = remaining == 0;
}

}  // namespace

void sample_tokens_cpu(const SampleTokensParams& p) {
  validate(p);
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto sample = bf16 ? kernels.sample_bf16 : kernels.sample_f32;
  const int64_t row_bytes = p.logits_row_stride * (bf16 ? 2 : 4);
  cpu::parallel_for(p.num_rows, p.num_threads, [&](int64_t n) {
    cpu::SampleRow row{};
    row.logits = static_cast<const char*>(p.logits) + n * row_bytes;
    row.vocab_size = p.vocab_size;
    row.temperature = p.temperatures ? p.temperatures[n] : p.temperature;
    row.seed = uint64_t(p.seeds ? p.seeds[n] : p.seed);
    row.row_id = uint32_t(p.row_ids ? p.row_ids[n] : n);
    row.step = uint32_t(p.steps ? p.steps[n] : p.step);
    row.bias_ids = p.bias_ids + n * p.bias_row_stride;
    row.bias_values = p.bias_values + n * p.bias_row_stride;
    row.bias_count = p.bias_count;
    row.want_entropy = p.entropy || p.measure == Measure::kEntropy;
    row.want_margin = p.margin || p.measure == Measure::kMargin;
    const cpu::RowFilter filter{p.top_ks ? p.top_ks[n] : p.top_k, p.top_ps ? p.top_ps[n] : p.top_p,
                                p.confidence_at_temperature};
    const cpu::SampleRowResult found =
        filter.is_active(row) ? cpu::sample_filtered(kernels, bf16, row, filter) : sample(row);

    p.token[n] = found.token;
    p.logprob[n] = found.logprob;
    if (p.entropy) p.entropy[n] = found.entropy;
    if (p.margin) p.margin[n] = found.margin;
    float confidence = std::exp(found.logprob);
    if (p.measure == Measure::kMargin) confidence = found.margin;
    if (p.measure == Measure::kEntropy) confidence = -found.entropy;
    if (p.measure == Measure::kRandom) {
      const PhiloxWords counter{{0, row.row_id, row.step, kStreamSampleRandom}};
      confidence = float(philox4x32(counter, uint32_t(row.seed), uint32_t(row.seed >> 32)).word[0] >> 8) * 0x1p-24f;
    }
    p.confidence[n] = found.valid ? confidence : -std::numeric_limits<float>::infinity();
  });
}

void remask_cpu(const RemaskParams& p) {
  validate(p);
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    if (p.tokens_are_int64) {
      remask_sequence(p, static_cast<int64_t*>(p.tokens), s);
    } else {
      remask_sequence(p, static_cast<int32_t*>(p.tokens), s);
    }
  }
}

}  // namespace illada::remask
