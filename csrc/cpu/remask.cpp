#include "illada/remask.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "illada/error.h"

namespace illada::remask {
namespace {

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
