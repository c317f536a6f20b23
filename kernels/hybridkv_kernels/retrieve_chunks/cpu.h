// Chunk retrieval of all dynamic heads of one layer: score summaries, exact top chunks, fetch what is missing.
#pragma once
#include "../cpu/args.h"
#include "../cpu/head_pages.h"
#include "../cpu/vec.h"

namespace HK_NAMESPACE {

// Score of a chunk, or of a part of it, for a query group; `low` is the mean, or the minimum with `high` the maximum of
// its keys.
template <int D>
static float chunk_score(const RetrieveArgs& a, const float* q, const float* q_norm, int group, const float* low,
                         const float* high) {
  float best = -std::numeric_limits<float>::infinity(), total = 0.f;
  alignas(64) float centre[D];
  float extent = 0.f;
  if (a.chunk_score == HK_ARKVALE) {
    for (int d = 0; d < D; ++d) centre[d] = (high[d] + low[d]) / 2, extent += (high[d] - low[d]) * (high[d] - low[d]);
    extent = std::sqrt(extent) / 2;
  }
  for (int g = 0; g < group; ++g) {
    const float* query = q + g * D;
    float score = 0.f;
    if (a.chunk_score == HK_QUEST) {
#pragma omp simd reduction(+ : score)
      for (int d = 0; d < D; ++d) score += query[d] * (query[d] > 0.f ? high[d] : low[d]);
    } else if (a.chunk_score == HK_ARKVALE) {
      score = dot<D>(query, centre) + q_norm[g] * extent / 2;
    } else {
      score = dot<D>(query, low);
    }
    best = std::max(best, score);
    total += score;
  }
  return a.chunk_score == HK_MEAN_MEAN ? total / float(group) : best;
}

template <typename T, int D>
struct DynamicHead {
  using Storage = typename T::Storage;
  const RetrieveArgs& a;
  int64_t row, head, num_chunks, num_selected;
  int kv_head;

  void score(const Storage* q_src, int group, std::vector<float>& scores) const {
    alignas(64) float q[kMaxGroup * D], low[D], high[D];
    float q_norm[kMaxGroup];
    for (int i = 0; i < group * D; ++i) q[i] = T::load(q_src[i]);
    for (int g = 0; g < group; ++g) q_norm[g] = std::sqrt(dot<D>(q + g * D, q + g * D));
    const bool is_box = a.chunk_score == HK_QUEST || a.chunk_score == HK_ARKVALE;
    Summaries<Storage, D, RetrieveArgs> summary{a, row, head};
    for (int64_t c = 0; c < num_chunks; ++c) {
      float score = -std::numeric_limits<float>::infinity();
      const int64_t first = c * a.stored_vectors;
      for (int64_t v = first; v < first + a.summary_vectors; v += is_box ? 2 : 1) {
        load_row<T, D>(summary(v), low);
        if (is_box) load_row<T, D>(summary(v + 1), high);
        score = std::max(score, chunk_score<D>(a, q, q_norm, group, low, high));
      }
      // NaN has no order, and std::nth_element leaves the array without one.
      scores[size_t(c)] = std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
    }
  }

  // Sinks first, then the most recent, as many as leave one place to the score; returns how many.
  int64_t force(std::vector<float>& scores) const {
    const int64_t places = std::max<int64_t>(num_selected - 1, 1), sinks = std::min<int64_t>(places, a.num_sink_chunks);
    const int64_t recent = std::min<int64_t>(places - sinks, a.num_recent_chunks);
    int64_t forced = 0;
    for (int64_t c = 0; c < num_chunks; ++c)
      if (c < sinks || c >= num_chunks - recent) scores[size_t(c)] = std::numeric_limits<float>::infinity(), ++forced;
    return forced;
  }

  // Chosen chunks in ascending order; among equal scores the earlier chunk wins.
  std::vector<int32_t> select(const std::vector<float>& scores) const {
    std::vector<int32_t> order;
    order.resize(size_t(num_chunks));
    for (int64_t c = 0; c < num_chunks; ++c) order[size_t(c)] = int32_t(c);
    const auto better = [&](int32_t x, int32_t y) {
      return scores[size_t(x)] > scores[size_t(y)] || (scores[size_t(x)] == scores[size_t(y)] && x < y);
    };
    if (num_selected < num_chunks)
      std::nth_element(order.begin(), order.begin() + num_selected, order.end(), better);
    order.resize(size_t(num_selected));
    std::sort(order.begin(), order.end());
    return order;
  }

  int64_t fetch(const std::vector<int32_t>& selected) const {
    enum : uint8_t { kUnwanted, kMissing, kResident };
    std::vector<uint8_t> state(size_t(num_chunks), kUnwanted);
    for (int32_t c : selected) state[size_t(c)] = kMissing;
    std::vector<int64_t> victims;
    for (int64_t place = 0; place < num_selected; ++place) {
      const int64_t page = head_page(a, row, a.first_head_page[head] + place);
      uint8_t& held = state[size_t(a.chunk_of_head_page[page])];
      if (held == kMissing) held = kResident;
      else victims.push_back(page);
    }
    const int64_t per_page = int64_t(a.num_layers) * a.num_kv_heads, page_elements = int64_t(a.page_size) * D;
    size_t next = 0;
    for (int32_t c : selected) {
      if (state[size_t(c)] == kResident) continue;
      const int64_t linear = int64_t(a.host_rank[head]) * num_chunks + c;
      const int64_t src = int64_t(a.host_pages[row * a.max_host_pages + linear / per_page]) * per_page + linear % per_page;
      const int64_t dst = victims[next++];
      const size_t bytes = size_t(page_elements) * sizeof(Storage);
      std::memcpy(static_cast<Storage*>(a.k_flat) + dst * page_elements,
                  static_cast<const Storage*>(a.k_host) + src * page_elements, bytes);
      std::memcpy(static_cast<Storage*>(a.v_flat) + dst * page_elements,
                  static_cast<const Storage*>(a.v_host) + src * page_elements, bytes);
      a.chunk_of_head_page[dst] = c;
    }
    return int64_t(next);
  }
};

template <typename T, int D>
void retrieve_chunks(const RetrieveArgs& a) {
  const int group = a.num_q_heads / a.num_kv_heads;
  int64_t chosen = 0, moved = 0;
#pragma omp parallel for schedule(dynamic) num_threads(a.num_threads) reduction(+ : chosen, moved)
  for (int64_t e = 0; e < int64_t(a.batch) * a.num_kv_heads; ++e) {
    const int64_t row = a.req_rows[e / a.num_kv_heads];
    const int kv_head = int(e % a.num_kv_heads);
    const int64_t head = (row * a.num_layers + a.layer_idx) * a.num_kv_heads + kv_head;
    if (a.num_pages[row] == 0 || !a.is_dynamic[head]) continue;
    const DynamicHead<T, D> dynamic{a, row, head, a.num_chunks[row], a.num_head_pages[head], kv_head};
    std::vector<float> scores(size_t(dynamic.num_chunks));
    dynamic.score(static_cast<const typename T::Storage*>(a.q) + e * group * D, group, scores);
    chosen += dynamic.num_selected - dynamic.force(scores);
    moved += dynamic.fetch(dynamic.select(scores));
  }
  a.counters[0] += chosen;
  a.counters[1] += chosen - moved;
}

}  // namespace HK_NAMESPACE
