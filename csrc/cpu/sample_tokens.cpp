#include "illada/sampling.h"

#include <cmath>
#include <limits>

#include "common/philox.h"
#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "cpu/sample_filter.h"
#include "illada/error.h"

namespace illada::sampling {
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

}  // namespace illada::sampling
