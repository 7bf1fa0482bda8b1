#include <algorithm>
#include <vector>

#include "illada/attention.h"
#include "illada/error.h"

namespace illada::attention {

bool plan_cpu(const PlanParams& p) {
  const int64_t count = p.shape.num_sequences;
  ILLADA_CHECK(p.cu_seqlens && p.plan && count >= 0, "attention_plan",
               "cu_seqlens and plan must not be null, nor num_sequences negative");
  const int32_t *q = p.cu_seqlens, *k = p.cu_seqlens_k ? p.cu_seqlens_k : q;
  bool fits = q[0] == 0 && q[count] <= p.shape.total_q && k[0] >= 0;
  for (int64_t s = 0; s < count; ++s) {
    fits = fits && q[s] <= q[s + 1] && k[s] <= k[s + 1];
    if (p.seqused_k) fits = fits && 0 <= p.seqused_k[s] && p.seqused_k[s] <= int64_t(k[s + 1]) - k[s];
  }
  if (!fits) return false;
  const auto keys = [&](int64_t s) { return int64_t(p.seqused_k ? p.seqused_k[s] : k[s + 1] - k[s]); };
  const auto pairs = [&](int64_t s) { return (int64_t(q[s + 1]) - q[s]) * keys(s); };
  std::vector<int64_t> order(size_t(count), 0);
  for (int64_t s = 0; s < count; ++s) order[size_t(s)] = s;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return pairs(a) > pairs(b); });
  int32_t* row = p.plan;
  for (const int64_t s : order) {
    row[0] = q[s];
    row[1] = q[s + 1];
    row[2] = k[s];
    row[3] = int32_t(k[s] + keys(s));
    row += 4;
  }
  row[0] = q[count];  // of the queries behind the last sequence, which meet no keys
  row[1] = int32_t(p.shape.total_q);
  row[2] = row[3] = 0;
  return true;
}

}  // namespace illada::attention
