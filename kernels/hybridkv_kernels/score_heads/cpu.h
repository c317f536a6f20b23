// Observation of a prompt: attention of its last queries, per KV head, in one pass over the keys.
#pragma once
#include "../cpu/args.h"
#include "../cpu/vec.h"

namespace HK_NAMESPACE {

constexpr int kKeyTile = 64;

// Attention of one KV head: probs [W, N], averaged over the group, and queries [W, G, N].
template <typename T, int D>
static void observe_head(const ScoreArgs& a, int kv_head, float* probs, std::vector<float>& logits) {
  using Storage = typename T::Storage;
  const int group = a.num_q_heads / a.num_kv_heads;
  const int64_t num_tokens = a.num_tokens, num_queries = int64_t(a.num_rows) * group;
  std::vector<float> q(size_t(num_queries) * D), tile(kKeyTile * D);
  logits.resize(size_t(num_queries) * size_t(num_tokens));
  for (int w = 0; w < a.num_rows; ++w)
    for (int g = 0; g < group; ++g) {
      const auto* src = static_cast<const Storage*>(a.q) + (int64_t(w) * a.num_q_heads + kv_head * group + g) * D;
      float* dst = &q[(size_t(w) * group + g) * D];
      for (int d = 0; d < D; ++d) dst[d] = T::load(src[d]) * a.scaling;
    }
  for (int64_t start = 0; start < num_tokens; start += kKeyTile) {
    const int n = int(std::min<int64_t>(kKeyTile, num_tokens - start));
    for (int i = 0; i < n; ++i) {
      const int64_t slot = a.slots ? a.slots[start + i] : start + i;
      load_row<T, D>(static_cast<const Storage*>(a.k) + (slot * a.num_kv_heads + kv_head) * D, &tile[size_t(i) * D]);
    }
    for (int64_t r = 0; r < num_queries; ++r)
      for (int i = 0; i < n; ++i)
        logits[size_t(r * num_tokens + start + i)] = dot<D>(&q[size_t(r) * D], &tile[size_t(i) * D]);
  }
  for (int w = 0; w < a.num_rows; ++w) {
    const int64_t causal = num_tokens - a.num_rows + w + 1;
    float* row = probs + int64_t(w) * num_tokens;
    std::fill(row, row + num_tokens, 0.f);
    for (int g = 0; g < group; ++g) {
      float* x = &logits[size_t((int64_t(w) * group + g) * num_tokens)];
      const float top = *std::max_element(x, x + causal);
      float sum = 0.f;
      for (int64_t j = 0; j < causal; ++j) sum += x[j] = std::exp(x[j] - top);
      const float factor = 1.f / (sum * float(group));
#pragma omp simd
      for (int64_t j = 0; j < causal; ++j) row[j] += x[j] * factor;
      for (int64_t j = 0; j < num_tokens; ++j) x[j] = j < causal ? x[j] / sum : 0.f;
    }
  }
}

// The probabilities of one row, to be sorted: std::sort needs an order, which NaN does not have.
static void copy_ordered(const float* row, std::vector<float>& out) {
  std::replace_copy_if(row, row + out.size(), out.begin(), [](float p) { return std::isnan(p); }, 0.f);
}

// Share of causal (row, key) pairs below a fraction of the row's largest probability.
static double sparsity(const ScoreArgs& a, const float* probs) {
  int64_t below = 0, pairs = 0;
  for (int w = 0; w < a.num_rows; ++w) {
    const int64_t causal = a.num_tokens - a.num_rows + w + 1;
    const float* row = probs + int64_t(w) * a.num_tokens;
    const float level = a.sparsity_fraction * *std::max_element(row, row + causal);
    for (int64_t j = 0; j < causal; ++j) below += row[j] < level;
    pairs += causal;
  }
  return double(below) / double(pairs);
}

// 1 - the share of keys that hold a mass of a row's probability, mean over rows.
static double top_mass(const ScoreArgs& a, const float* probs) {
  std::vector<float> ordered(static_cast<size_t>(a.num_tokens));
  double total = 0.0;
  for (int w = 0; w < a.num_rows; ++w) {
    const int64_t causal = a.num_tokens - a.num_rows + w + 1;
    const float* row = probs + int64_t(w) * a.num_tokens;
    copy_ordered(row, ordered);
    std::sort(ordered.begin(), ordered.end(), [](float x, float y) { return x > y; });
    int64_t needed = 0;
    float mass = 0.f;
    while (needed < a.num_tokens && (mass += ordered[size_t(needed)]) < a.mass_fraction) ++needed;
    total += 1.0 - std::min(1.0, double(needed + 1) / double(causal));
  }
  return total / a.num_rows;
}

// cv / (1 + cv) of the rows that hit a chunk, over chunks.
static double hit_cv(const ScoreArgs& a, const float* probs) {
  const int64_t num_chunks = (a.num_tokens + a.chunk_size - 1) / a.chunk_size;
  std::vector<int32_t> hits(static_cast<size_t>(num_chunks), 0);
  std::vector<float> ordered(static_cast<size_t>(a.num_tokens));
  for (int w = 0; w < a.num_rows; ++w) {
    const int64_t causal = a.num_tokens - a.num_rows + w + 1;
    const float* row = probs + int64_t(w) * a.num_tokens;
    copy_ordered(row, ordered);
    const auto at_low = ordered.begin() + a.low_rank, at_high = ordered.begin() + a.high_rank;
    std::nth_element(ordered.begin(), at_high, ordered.end());
    const float high = *at_high;
    std::nth_element(ordered.begin(), at_low, at_high);  // low_rank is below high_rank, or the two are one
    const float low = *at_low;
    const float level = low + a.hit_level * (high - low);
    int64_t last = -1;
    for (int64_t j = 0; j < causal; ++j)
      if (row[j] >= level && row[j] > 0.f && j / a.chunk_size != last) ++hits[size_t(last = j / a.chunk_size)];
  }
  double mean = 0.0, variance = 0.0;
  for (int32_t n : hits) mean += n;
  mean /= double(num_chunks);
  for (int32_t n : hits) variance += (n - mean) * (n - mean);
  const double cv = std::sqrt(variance / double(num_chunks)) / std::max(mean, 1e-9);
  return cv / (1.0 + cv);
}

// What two consecutive rows have in common, mean over pairs; NaN counts as 0.
static double stability(const ScoreArgs& a, const float* probs) {
  if (a.num_rows == 1) return 0.0;
  double total = 0.0;
  for (int w = 0; w + 1 < a.num_rows; ++w) {
    const float *row = probs + int64_t(w) * a.num_tokens, *next = row + a.num_tokens;
    for (int64_t j = 0; j < a.num_tokens; ++j) total += row[j] < next[j] ? row[j] : next[j] <= row[j] ? next[j] : 0.f;
  }
  return std::min(1.0, total / (a.num_rows - 1));
}

// A query's probability on sinks, recent keys and those that its group wants most in the other rows, minimum where
// `is_worst`, otherwise mean; NaN counts as 0.
static double capture(const ScoreArgs& a, const float* probs, const float* queries, bool is_worst) {
  if (a.num_rows == 1) return 0.0;
  const size_t num_tokens = size_t(a.num_tokens);
  std::vector<float> row(num_tokens);
  std::vector<double> sum(num_tokens, 0.0), others(num_tokens), ordered(num_tokens);
  for (int w = 0; w < a.num_rows; ++w) {
    copy_ordered(probs + int64_t(w) * a.num_tokens, row);
    for (size_t j = 0; j < num_tokens; ++j) sum[j] += double(row[j]);
  }
  const int group = a.num_q_heads / a.num_kv_heads;
  std::vector<double> captured(size_t(a.num_rows) * group, 0.0);
  for (int w = 0; w < a.num_rows; ++w) {
    copy_ordered(probs + int64_t(w) * a.num_tokens, row);
    for (size_t j = 0; j < num_tokens; ++j) others[j] = sum[j] - double(row[j]);
    const int64_t own = a.num_tokens - a.num_rows + w, first_recent = std::max<int64_t>(own + 1 - a.num_recent, 0);
    std::fill(others.begin() + first_recent, others.begin() + own + 1, INFINITY);
    std::fill_n(others.begin(), std::min<int64_t>(a.num_sinks, a.num_tokens), INFINITY);
    ordered = others;
    const auto last = ordered.begin() + (a.num_captured - 1);
    std::nth_element(ordered.begin(), last, ordered.end(), [](double x, double y) { return x > y; });
    const double level = *last;
    int64_t ties = a.num_captured - std::count_if(ordered.begin(), last, [=](double x) { return x > level; });
    for (size_t j = 0; j < num_tokens; ++j) {
      if (!(others[j] > level || (others[j] == level && ties-- > 0))) continue;
      for (int g = 0; g < group; ++g) {
        const float p = queries[(size_t(w) * group + g) * num_tokens + j];
        captured[size_t(w) * group + g] += std::isnan(p) ? 0.0 : double(p);
      }
    }
  }
  double total = 0.0, worst = 1.0;
  for (double mass : captured) total += std::min(1.0, mass), worst = std::min(worst, mass);
  return is_worst ? worst : total / double(captured.size());
}

static double statistic(const ScoreArgs& a, int number, const float* probs, const float* queries) {
  switch (number) {
    case HK_SPARSITY: return sparsity(a, probs);
    case HK_TOP_MASS: return top_mass(a, probs);
    case HK_HIT_CV: return hit_cv(a, probs);
    case HK_STABILITY: return stability(a, probs);
    default: return capture(a, probs, queries, number == HK_WORST_CAPTURE);
  }
}

template <typename T, int D>
void score_heads(const ScoreArgs& a) {
#pragma omp parallel for schedule(dynamic) num_threads(a.num_threads)
  for (int h = 0; h < a.num_kv_heads; ++h) {
    std::vector<float> probs(size_t(a.num_rows) * a.num_tokens), queries;
    observe_head<T, D>(a, h, probs.data(), queries);
    for (int s = 0; s < a.num_statistics; ++s)
      a.out_statistic[h * a.num_statistics + s] = float(statistic(a, a.statistics[s], probs.data(), queries.data()));
    float* salience = a.out_salience + int64_t(h) * a.num_tokens;
    std::fill(salience, salience + a.num_tokens, 0.f);
    for (int w = 0; w < a.num_rows; ++w) {
      const float* row = &probs[size_t(w) * a.num_tokens];
#pragma omp simd
      for (int64_t j = 0; j < a.num_tokens; ++j) salience[j] += row[j];
    }
    const float share = 1.f / float(a.num_rows);
    for (int64_t j = 0; j < a.num_tokens; ++j) salience[j] *= share;
  }
}

}  // namespace HK_NAMESPACE
