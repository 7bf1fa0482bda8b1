// Validates a call and enqueues it.
#include "remask/launch.h"

#include <limits>

#include "common/check.h"

namespace illada::remask {

void remask_cuda(const RemaskParams& p) {
  constexpr const char* kOp = "remask";
  ILLADA_CHECK(p.num_rows >= 0 && p.num_sequences >= 0 && p.num_tokens >= 0, kOp, "negative size: ", p.num_rows,
               " rows, ", p.num_sequences, " sequences, ", p.num_tokens, " tokens");
  // Indices of threads may lie behind the last row, by at most the number of threads of a CTA.
  constexpr int64_t kMaxSequences = std::numeric_limits<int32_t>::max() - 1, kMaxRows = kMaxSequences - 1023;
  ILLADA_CHECK(p.num_rows <= kMaxRows, kOp, "rows may have ", kMaxRows, " elements, got ", p.num_rows);
  ILLADA_CHECK(p.num_sequences <= kMaxSequences, kOp, "cu_rows may name ", kMaxSequences, " sequences, got ",
               p.num_sequences);
  ILLADA_CHECK(p.rule != Rule::kEntropyBound || p.entropy || p.num_rows == 0, kOp,
               "entropy_bound needs a sample with entropies");
  ILLADA_CHECK(p.min_commit >= 0, kOp, "min_commit must not be negative, got ", p.min_commit);
  ILLADA_CHECK(p.num_end_ids >= 0, kOp, "negative number of end_ids: ", p.num_end_ids);
  if (p.num_sequences == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const int64_t n = p.num_rows, s = p.num_sequences;
  check_regions(kOp, p.launch,
                {{"rows", p.rows, 4 * n},
                 {"cu_rows", p.cu_rows, 4 * (s + 1)},
                 {"sample.token", p.token, 8 * n},
                 {"sample.confidence", p.confidence, 4 * n},
                 {"sample.entropy", p.entropy, 4 * n, true},
                 {"the rule's limit", p.limits, 4 * s, true},
                 {"end_ids", p.end_ids, 8 * p.num_end_ids}},
                {{"tokens", p.tokens, p.num_tokens * (p.tokens_are_int64 ? 8 : 4), n == 0},
                 {"committed", p.committed, 4 * s},
                 {"remaining", p.remaining, 4 * s, true},
                 {"finished", p.finished, s, true},
                 {"ended", p.ended, s, true}});
  launch_remask(p, gpu);
}

}  // namespace illada::remask
