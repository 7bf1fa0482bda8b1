// One confidence-remasking step without Python: sample a token for each masked position, commit the two surest.
#include <illada/illada.h>

#include <cstdio>
#include <vector>

int main() {
  constexpr int kRows = 4, kVocab = 8, kMaskId = 5;
  std::vector<float> logits(kRows * kVocab, 0.0f);
  for (int n = 0; n < kRows; ++n) logits[n * kVocab + n] = 1.0f + n;  // row n prefers token n, later rows more surely
  std::vector<int64_t> tokens(kRows, kMaskId), sampled(kRows);
  std::vector<float> confidence(kRows), logprob(kRows);
  std::vector<int32_t> rows{0, 1, 2, 3}, cu_rows{0, kRows}, committed(1);

  illada::sampling::SampleTokensParams sample;
  sample.logits = logits.data(), sample.logits_row_stride = kVocab;
  sample.num_rows = kRows, sample.vocab_size = kVocab;
  sample.token = sampled.data(), sample.confidence = confidence.data(), sample.logprob = logprob.data();
  illada::sampling::sample_tokens_cpu(sample);

  illada::remask::RemaskParams remask;
  remask.tokens = tokens.data(), remask.num_tokens = kRows;
  remask.rows = rows.data(), remask.cu_rows = cu_rows.data(), remask.num_rows = kRows, remask.num_sequences = 1;
  remask.token = sampled.data(), remask.confidence = confidence.data();
  remask.rule = illada::remask::Rule::kQuota, remask.limit = 2, remask.mask_id = kMaskId;
  remask.committed = committed.data();
  illada::remask::remask_cpu(remask);

  std::printf("illada %s on %s:", illada::build_info().version.c_str(), illada::build_info().cpu_isa.c_str());
  for (int64_t token : tokens) std::printf(" %d", int(token));
  std::printf(" (%d committed)\n", committed[0]);
}
