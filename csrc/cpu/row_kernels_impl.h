// Loops over one row of logits, and the table of all loops. row_kernels_{avx512,avx2,baseline}.cpp include this file
// with ILLADA_ISA set.
//
// A row is read from memory once, in blocks of kBlock elements that stay in the first-level cache. The first pass over
// a block finds its maximum. The second pass sums exp2((x - reference) * log2 e). The reference is the running maximum.
// It moves once per block, not once per element. The loop therefore has no branches and no dependency on the maximum.
#pragma once

#include <cmath>
#include <limits>

#include "common/philox.h"
#include "cpu/attention_backward_impl.h"
#include "cpu/attention_impl.h"
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace illada::cpu::ILLADA_ISA {

constexpr int64_t kBlock = 2048;

// Online softmax terms of a row, in base 2 and relative to `reference`:
//   sum = sum 2^((x - reference) log2 e),   weighted = sum 2^(...) * (x - reference) log2 e.
struct SoftmaxState {
  float reference = -kInfinity;
  float second = -kInfinity;  // second largest logit (equal to the largest if that occurs twice)
  double sum = 0, weighted = 0;
  bool valid = true;  // no NaN, no +inf so far

  RowLse lse() const { return {reference, float(std::log2(sum) * kLn2)}; }
};

template <bool kWantSecond, typename T>
inline void block_maximum(const T* x, int64_t count, SoftmaxState& state, float& block_max) {
  VecF first = splat(-kInfinity), second = first;
  VecI nan{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VecF v = load(x + i);
    nan |= v != v;
    if constexpr (kWantSecond) second = max(min(first, v), second);
    first = max(v, first);  // a NaN in v keeps first
  }
  float top = kWantSecond ? -kInfinity : horizontal_max(first), next = -kInfinity;
  const auto offer = [&](float value) {
    if (value > top) {
      next = top;
      top = value;
    } else if (value > next) {
      next = value;
    }
  };
  if constexpr (kWantSecond) {
    for (int lane = 0; lane < kLanes; ++lane) {
      offer(first[lane]);
      offer(second[lane]);
    }
  }
  bool has_nan = any(nan);
  for (; i < count; ++i) {
    const float value = to_float(x[i]);
    has_nan |= value != value;
    offer(value);
  }
  if (has_nan || top == kInfinity) state.valid = false;
  if constexpr (kWantSecond) {
    const float old_top = state.reference;
    if (top > old_top) {
      state.second = next > old_top ? next : old_top;
    } else if (top > state.second) {
      state.second = top;
    }
  }
  block_max = top;
}

template <bool kWantEntropy, typename T>
inline void block_sum(const T* x, int64_t count, float block_max, SoftmaxState& state) {
  if (block_max > state.reference) {
    if (state.sum > 0) {
      const double shift = (double(state.reference) - block_max) * kLog2e, factor = std::exp2(shift);
      if constexpr (kWantEntropy) state.weighted = (state.weighted + shift * state.sum) * factor;
      state.sum *= factor;
    }
    state.reference = block_max;
  }
  if (state.reference == -kInfinity) return;  // nothing but -inf so far: adds nothing
  const VecF reference = splat(state.reference);
  VecF sum0{}, sum1{}, weighted{};
  int64_t i = 0;
  const auto add = [&](VecF v, VecF& sum) {
    const VecF d = (v - reference) * kLog2eF;
    const VecF e = exp2(d);
    sum += e;
    if constexpr (kWantEntropy) {
      // Adds 0 where exp2 has its least value, 2^-126: the entropy of a row with one finite logit is 0, not 3e-34.
      weighted += d <= -126.0f ? VecF{} : e * d;
    }
  };
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    add(load(x + i), sum0);
    add(load(x + i + kLanes), sum1);
  }
  for (; i + kLanes <= count; i += kLanes) add(load(x + i), sum0);
  state.sum += horizontal_sum(sum0 + sum1);
  if constexpr (kWantEntropy) state.weighted += horizontal_sum(weighted);
  for (; i < count; ++i) {
    const double d = (double(to_float(x[i])) - state.reference) * kLog2e, e = std::exp2(d);
    state.sum += e;
    if constexpr (kWantEntropy) state.weighted += d <= -126 ? 0 : e * d;
  }
}

// kLanes / 2 Philox counters side by side, one in the low half of each 64-bit word. The upper halves collect garbage,
// which no operation reads: the multiplication reads only low halves.
struct PhiloxLanes {
  VecL key0[10], key1[10];
  VecL row_id, step, stream, iota;

  PhiloxLanes(uint64_t seed, uint32_t row, uint32_t at_step, uint32_t stream_tag) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      key0[round] = VecL{} + k0;
      key1[round] = VecL{} + k1;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    row_id = VecL{} + row;
    step = VecL{} + at_step;
    stream = VecL{} + stream_tag;
    for (int i = 0; i < kLanes / 2; ++i) iota[i] = uint64_t(i);
  }

  // Draws the words for vocabulary ids 4 * first .. 4 * first + kDrawn - 1, in order. Two chains of rounds run side by
  // side; a single chain would wait for its own multiplications.
  static constexpr int kDrawn = 4 * kLanes;
  void draw(uint64_t first, VecU words[4]) const {
    VecL c0[2], c1[2], c2[2], c3[2];
    for (int chain = 0; chain < 2; ++chain) {
      c0[chain] = iota + (first + uint64_t(chain) * (kLanes / 2));
      c1[chain] = row_id, c2[chain] = step, c3[chain] = stream;
    }
    const VecL m0 = VecL{} + kPhiloxM0, m1 = VecL{} + kPhiloxM1;
    for (int round = 0; round < 10; ++round) {
      for (int chain = 0; chain < 2; ++chain) {
        const VecL p0 = mul_low32(c0[chain], m0), p1 = mul_low32(c2[chain], m1);
        c0[chain] = (p1 >> 32) ^ c1[chain] ^ key0[round];
        c1[chain] = p1;
        c2[chain] = (p0 >> 32) ^ c3[chain] ^ key1[round];
        c3[chain] = p0;
      }
    }
    for (int64_t chain = 0; chain < 2; ++chain) {
      VecL even, odd;
      interleave((c0[chain] & 0xffffffffu) | (c1[chain] << 32), (c2[chain] & 0xffffffffu) | (c3[chain] << 32), even,
                 odd);
      words[2 * chain] = bit_cast<VecU>(even);
      words[2 * chain + 1] = bit_cast<VecU>(odd);
    }
  }
};

// Gumbel-max over a row as an exponential race. Token v with the largest x + T G wins, where G = -log(E) and
// E = -log(1 - u). Because E >= u, a token whose u is too large to beat the best score so far needs no logarithm:
//   x + T G > best  =>  u <= E < exp((x - best) / T)  =>  log2(u) < (x - best) / (T ln 2).
// The bits of a float, read as an integer, bound its log2 from below: 2^e (1 + f) has log2 >= e + f. Tokens that pass
// (a handful per row) are computed in double precision with 64 random bits.
class NoisyArgmax {
 public:
  explicit NoisyArgmax(const SampleRow& row)
      : row_(row),
        lanes_(row.seed, row.row_id, row.step, kStreamSample),
        inverse_temperature_(float(std::fmin(kLog2e / row.temperature, 1e30))) {}

  template <typename T>
  void block(const T* x, int64_t first, int64_t count) {
    int64_t i = 0;
    for (; i + PhiloxLanes::kDrawn <= count; i += PhiloxLanes::kDrawn) {
      VecU words[4];
      lanes_.draw(uint64_t(first + i) / 4, words);
      for (int64_t part = 0; part < 4; ++part) {
        const int64_t at = i + part * kLanes;
        const VecF v = load(x + at);
        const VecI win = may_win(v, words[part]);
        if (any(win)) {
          for (int lane = 0; lane < kLanes; ++lane)
            if (win[lane]) offer(v[lane], words[part][lane], first + at + lane);
        }
      }
    }
    for (; i < count; ++i) {
      const uint64_t v = uint64_t(first + i);
      offer(to_float(x[i]), word(v, kStreamSample), int64_t(v));
    }
  }

  int64_t token() const { return token_; }
  float logit() const { return logit_; }

 private:
  // Returns, for each lane, whether its token may beat the best score so far. u is rounded down to 24 bits, in units of
  // 2^-24. 2e-4 covers the rounding errors of both sides, which stay below 2^8.
  VecI may_win(VecF x, VecU words) const {
    const VecF u = __builtin_convertvector(bit_cast<VecI>(words >> 8), VecF);
    const VecF log2_u = __builtin_convertvector(bit_cast<VecI>(u), VecF) * 0x1p-23f - (127.0f + 24.0f + 2e-4f);
    return log2_u <= (x - best_below_) * inverse_temperature_;
  }

  uint32_t word(uint64_t v, uint32_t stream) const {
    const PhiloxWords counter{{uint32_t(v / 4), row_.row_id, row_.step, stream}};
    return philox4x32(counter, uint32_t(row_.seed), uint32_t(row_.seed >> 32)).word[v % 4];
  }

  void offer(float x, uint32_t upper, int64_t v) {
    const double lower = word(uint64_t(v), kStreamSampleLowBits);
    const double u = (double(upper) + (lower + 0.5) * 0x1p-32) * 0x1p-32;
    const double noisy = double(x) - double(row_.temperature) * std::log(-std::log1p(-u));
    if (noisy > best_) {  // strictly: in a tie the lowest index wins
      best_ = noisy;
      best_below_ = std::nextafterf(float(noisy), -kInfinity);
      token_ = v;
      logit_ = x;
    }
  }

  const SampleRow& row_;
  const PhiloxLanes lanes_;
  const float inverse_temperature_;
  double best_ = -std::numeric_limits<double>::infinity();
  float best_below_ = -kInfinity;  // best_, rounded down
  int64_t token_ = 0;
  float logit_ = -kInfinity;
};

template <typename T>
int64_t find_first(const T* x, int64_t count, float value) {
  int64_t i = 0;
  while (i + kLanes <= count && !any(load(x + i) == value)) i += kLanes;
  for (; i < count; ++i)
    if (to_float(x[i]) == value) return i;
  return 0;
}

template <bool kWantEntropy, bool kWantMargin, typename T>
SampleRowResult sample_row(const SampleRow& row, const T* logits) {
  SoftmaxState state;
  NoisyArgmax noisy(row);
  int64_t token = 0;
  float token_logit = -kInfinity;
  const auto visit = [&](const auto* x, int64_t first, int64_t count) {
    float block_max;
    const float best = state.reference;
    block_maximum<kWantMargin>(x, count, state, block_max);
    if (row.temperature > 0) {
      noisy.block(x, first, count);
    } else if (block_max > best) {
      token = first + find_first(x, count, block_max);
      token_logit = block_max;
    }
    if (state.valid) {
      block_sum<kWantEntropy>(x, count, block_max, state);
    } else if (block_max > state.reference) {
      state.reference = block_max;
    }
  };
  for (int64_t first = 0; first < row.vocab_size; first += kBlock) {
    const int64_t count = row.vocab_size - first < kBlock ? row.vocab_size - first : kBlock;
    bool biased = false;
    for (int64_t b = 0; b < row.bias_count; ++b) biased |= row.bias_ids[b] >= first && row.bias_ids[b] < first + count;
    if (!biased) {
      visit(logits + first, first, count);
    } else {
      float patched[kBlock];
      for (int64_t i = 0; i < count; ++i) patched[i] = to_float(logits[first + i]);
      for (int64_t b = 0; b < row.bias_count; ++b) {
        const int64_t at = row.bias_ids[b] - first;
        if (row.bias_ids[b] >= 0 && at >= 0 && at < count) patched[at] += row.bias_values[b];
      }
      visit(static_cast<const float*>(patched), first, count);
    }
  }
  if (row.temperature > 0) {
    token = noisy.token();
    token_logit = noisy.logit();
  }

  SampleRowResult result{token, -kInfinity, 0, 0, state.valid && state.sum > 0};
  const float quiet_nan = std::numeric_limits<float>::quiet_NaN();
  if (!result.valid) {
    result.entropy = result.margin = quiet_nan;
    return result;
  }
  const double log2_sum = std::log2(state.sum);
  result.logprob = float(double(token_logit) - state.reference - log2_sum * kLn2);
  if (kWantEntropy) result.entropy = float((log2_sum - state.weighted / state.sum) * kLn2);
  if (kWantMargin) {
    const double runner_up = std::exp2((double(state.second) - state.reference) * kLog2e);
    result.margin = float((1.0 - runner_up) / state.sum);
  }
  return result;
}

template <typename T>
SampleRowResult sample(const SampleRow& row) {
  const T* logits = static_cast<const T*>(row.logits);
  if (row.want_entropy)
    return row.want_margin ? sample_row<true, true>(row, logits) : sample_row<true, false>(row, logits);
  return row.want_margin ? sample_row<false, true>(row, logits) : sample_row<false, false>(row, logits);
}

template <typename T>
RowLse row_lse(const void* logits, int64_t vocab_size) {
  const T* x = static_cast<const T*>(logits);
  SoftmaxState state;
  for (int64_t first = 0; first < vocab_size; first += kBlock) {
    const int64_t count = vocab_size - first < kBlock ? vocab_size - first : kBlock;
    float block_max;
    block_maximum<false>(x + first, count, state, block_max);
    if (!state.valid) return {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
    block_sum<false>(x + first, count, block_max, state);
  }
  return state.lse();
}

template <typename T>
float logit(const void* logits, int64_t index) {
  return to_float(static_cast<const T*>(logits)[index]);
}

template <typename T>
void softmax_grad(const void* logits, void* grad, int64_t vocab_size, RowLse lse, float onehot_factor, float dlse,
                  int64_t target) {
  const T* x = static_cast<const T*>(logits);
  T* g = static_cast<T*>(grad);
  const float factor = onehot_factor + dlse;
  float target_grad = 0;  // before x is overwritten
  if (target >= 0) {
    const float p = std::exp(to_float(x[target]) - lse.maximum - lse.log_sum);
    target_grad = onehot_factor * (p - 1.0f) + dlse * p;
  }
  // A probability below 2^-100 counts as 0. Times the factor it could be denormal, and the GEMMs that read the gradient
  // are many times slower on denormals.
  constexpr float kSmallest = -100.0f;
  const VecF maximum = splat(lse.maximum), log_sum = splat(lse.log_sum), scale = splat(factor);
  int64_t i = 0;
  for (; i + kLanes <= vocab_size; i += kLanes) {
    const VecF d = (load(x + i) - maximum - log_sum) * kLog2eF;
    const VecF p = exp2(d);
    store(g + i, (d < kSmallest ? VecF{} : p) * scale);
  }
  for (; i < vocab_size; ++i) {
    const float d = to_float(x[i]) - lse.maximum - lse.log_sum;
    store_scalar(g + i, d * kLog2eF < kSmallest ? 0.0f : factor * std::exp(d));
  }
  if (target >= 0) store_scalar(g + target, target_grad);
}

constexpr RowKernels kTable{
    ILLADA_ISA_NAME, sample<float>,    sample<BFloat16>,     row_lse<float>,         row_lse<BFloat16>,
    logit<float>,    logit<BFloat16>,  softmax_grad<float>,  softmax_grad<BFloat16>, kTileRows,
    attend<float>,   attend<BFloat16>, differentiate<float>, differentiate<BFloat16>};

}  // namespace illada::cpu::ILLADA_ISA
