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

// One word of key codes, of whatever type the pool stores it in.
template <typename Storage>
static inline uint32_t code_word(Storage stored) {
  uint32_t word = 0;
  std::memcpy(&word, &stored, sizeof(Storage));
  return word;
}

// The word as a number of its own.
template <typename Storage>
static inline int64_t code_number(Storage stored) {
  return sizeof(Storage) == 2 ? int64_t(int16_t(code_word(stored))) : int64_t(int32_t(code_word(stored)));
}

// `rotation` of chunks.py, in place: butterflies of the largest power of two in C, and the power of two that is their
// scale.
template <int C>
static void turn_channels(float* x) {
  constexpr int kSize = C & -C;
  for (int width = 1; width < kSize; width *= 2)
    for (int start = 0; start < C; start += 2 * width)
#pragma omp simd
      for (int i = start; i < start + width; ++i) {
        const float sum = x[i] + x[i + width], difference = x[i] - x[i + width];
        x[i] = sum, x[i + width] = difference;
      }
  float scale = 1.f;
  for (int size = kSize; size > 1; size /= 4) scale *= 0.5f;
  for (int c = 0; c < C; ++c) x[c] *= scale;
}

// Products of B queries [B, C] with the codes of 2 * kCodedTokens tokens, whose words are at `first` and `second`, which
// may be null. The tokens are the lanes, so that nothing is summed across them.
template <typename Storage, int C, int B>
static void multiply_codes(const Storage* first, const Storage* second, const float* q, float* out) {
  constexpr int kLanes = 2 * kCodedTokens;
  alignas(64) float sums[B][kLanes] = {};
  for (int c = 0; c < C; ++c) {
    const uint32_t word = code_word(first[c]) | (second ? code_word(second[c]) << kLanes : 0u);
    float weights[B];
    for (int g = 0; g < B; ++g) weights[g] = q[g * C + c];
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float code = float(int32_t((word >> (2 * lane)) & 3u));
      for (int g = 0; g < B; ++g) sums[g][lane] += weights[g] * code;
    }
  }
  std::memcpy(out, sums, sizeof(sums));
}

// best[i]: the maximum over the group of factors[g] * (query g times the codes of token i - totals[g]), of up to two
// words.
template <typename Storage, int C>
static void score_codes(const Storage* first, const Storage* second, const float* q, const float* totals,
                        const float* factors, int group, float* best) {
  constexpr int kLanes = 2 * kCodedTokens, kBlock = 4;
  alignas(64) float products[kBlock * kLanes];
  std::fill(best, best + kLanes, -std::numeric_limits<float>::infinity());
  for (int start = 0; start < group; start += kBlock) {
    const int count = std::min(group - start, kBlock);
    const float* block = q + start * C;
    if (count == 4) multiply_codes<Storage, C, 4>(first, second, block, products);
    else if (count == 3) multiply_codes<Storage, C, 3>(first, second, block, products);
    else if (count == 2) multiply_codes<Storage, C, 2>(first, second, block, products);
    else multiply_codes<Storage, C, 1>(first, second, block, products);
    for (int g = start; g < start + count; ++g)
      for (int i = 0; i < kLanes; ++i)
        best[i] = std::max(best[i], factors[g] * (products[(g - start) * kLanes + i] - totals[g]));
  }
}

template <typename T, int D>
struct DynamicHead {
  using Storage = typename T::Storage;
  const RetrieveArgs& a;
  int64_t row, head, num_chunks, num_selected;

  void score(const Storage* q_src, int group, std::vector<float>& scores) const {
    if (a.chunk_score == HK_KEY_CODES) score_by_codes<D>(q_src, group, scores);
    else if (a.chunk_score == HK_HALF_CODES) score_by_codes<D / 2>(q_src, group, scores);
    else score_by_summaries(q_src, group, scores);
    // NaN has no order, and std::nth_element leaves the array without one.
    for (float& score : scores)
      if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
  }

  // The best token of each chunk. The query is multiplied by the step of the codes and rounded to the pool's type, as in
  // the other implementations. C of the D channels are coded, so that a summary vector holds D / C coded vectors.
  template <int C>
  void score_by_codes(const Storage* q_src, int group, std::vector<float>& scores) const {
    alignas(64) float q[kMaxGroup * C], step[C];
    float totals[kMaxGroup], factors[kMaxGroup], best[2 * kCodedTokens];
    Summaries<Storage, D, RetrieveArgs> summary{a, row, head};
    const auto coded = [&](int64_t vector) { return summary(vector * C / D) + vector * C % D; };
    load_row<T, C>(coded(0), step);
    const Storage* channels = coded(1);
    for (int g = 0; g < group; ++g) {
      float total = 0.f, square = 0.f, *query = q + g * C;
      for (int c = 0; c < C; ++c) query[c] = T::load(q_src[g * D + code_number(channels[c])]);
      turn_channels<C>(query);
      for (int c = 0; c < C; ++c) {
        const float scaled = std::min(std::max(query[c] * step[c], -T::kMax), T::kMax);
        query[c] = T::load(T::store(scaled));
        total += query[c], square += query[c] * query[c];
      }
      const float spread = std::sqrt(square);
      totals[g] = 1.5f * total, factors[g] = 1.f / (spread > 0.f ? spread : 1.f);
    }
    std::fill(scores.begin(), scores.end(), -std::numeric_limits<float>::infinity());
    const int64_t num_words = num_chunks * a.chunk_size / kCodedTokens;
    for (int64_t w = 0; w < num_words; w += 2) {
      // Two words lie side by side: the header has an even number of vectors, and so has each half of a page.
      const Storage* first = coded(kCodeHeader + w);
      const int64_t count = std::min<int64_t>(num_words - w, 2) * kCodedTokens;
      score_codes<Storage, C>(first, count > kCodedTokens ? first + C : nullptr, q, totals, factors, group, best);
      for (int64_t i = 0; i < count; ++i) {
        float& score = scores[size_t((w * kCodedTokens + i) / a.chunk_size)];
        score = std::max(score, best[i]);
      }
    }
  }

  void score_by_summaries(const Storage* q_src, int group, std::vector<float>& scores) const {
    alignas(64) float q[kMaxGroup * D], low[D], high[D];
    float q_norm[kMaxGroup];
    for (int i = 0; i < group * D; ++i) q[i] = T::load(q_src[i]);
    for (int g = 0; g < group; ++g) q_norm[g] = std::sqrt(dot<D>(q + g * D, q + g * D));
    const bool is_box = a.chunk_score == HK_QUEST || a.chunk_score == HK_ARKVALE;
    Summaries<Storage, D, RetrieveArgs> summary{a, row, head};
    for (int64_t c = 0; c < num_chunks; ++c) {
      float score = -std::numeric_limits<float>::infinity();
      const int64_t first = c * a.stored_vectors;
      for (int64_t v = first; v < first + a.score_vectors; v += is_box ? 2 : 1) {
        load_row<T, D>(summary(v), low);
        if (is_box) load_row<T, D>(summary(v + 1), high);
        score = std::max(score, chunk_score<D>(a, q, q_norm, group, low, high));
      }
      scores[size_t(c)] = score;
    }
  }

  // Chooses sinks first, then the most recent chunks, as many as leave one place to the score; returns how many.
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
    std::vector<int32_t> chosen;
    chosen.reserve(size_t(num_selected));
    float least = -std::numeric_limits<float>::infinity();
    int64_t ties = num_selected;
    if (num_selected < num_chunks) {
      std::vector<float> order(scores);
      const auto last = order.begin() + (num_selected - 1);
      std::nth_element(order.begin(), last, order.end(), std::greater<float>());
      least = *last;
    }
    for (int64_t c = 0; c < num_chunks; ++c) ties -= scores[size_t(c)] > least;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const float score = scores[size_t(c)];
      if (score > least || (score == least && ties-- > 0)) chosen.push_back(int32_t(c));
    }
    return chosen;
  }

  // Where the pool holds what is at a place of the buffer; places are counted in chunks.
  int64_t slot(int64_t place) const {
    const int64_t in_page = a.page_size / a.chunk_size;
    return head_page(a, row, a.first_head_page[head] + place / in_page) * in_page + place % in_page;
  }

  // A chunk that is not resident has to beat one that is by the hysteresis.
  void favour_resident(std::vector<float>& scores) const {
    if (a.hysteresis == 0.f) return;
    for (int64_t place = 0; place < num_selected; ++place) scores[size_t(a.held_chunks[slot(place)])] += a.hysteresis;
  }

  // Key and value of one token of the host store, widened as in `widen_rows` of host_pages.py where they are rounded.
  void read_record(const char* record, Storage* key, Storage* value) const {
    if (a.host_dtype == HK_SAME) {
      std::memcpy(key, record, D * sizeof(Storage));
      std::memcpy(value, record + D * sizeof(Storage), D * sizeof(Storage));
      return;
    }
    const auto* codes = reinterpret_cast<const int8_t*>(record);
    float scales[2];
    std::memcpy(scales, record + 2 * D, sizeof(scales));
#pragma omp simd
    for (int d = 0; d < D; ++d) key[d] = T::store(float(codes[d]) * scales[0]);
#pragma omp simd
    for (int d = 0; d < D; ++d) value[d] = T::store(float(codes[D + d]) * scales[1]);
  }

  int64_t fetch(const std::vector<int32_t>& selected) const {
    enum : uint8_t { kUnwanted, kMissing, kResident };
    std::vector<uint8_t> state(size_t(num_chunks), kUnwanted);
    for (int32_t c : selected) state[size_t(c)] = kMissing;
    std::vector<int64_t> victims;
    // Rows of the host store are counted in chunks, too.
    const int64_t in_page = a.page_size / a.chunk_size;
    for (int64_t place = 0; place < num_selected; ++place) {
      uint8_t& held = state[size_t(a.held_chunks[slot(place)])];
      if (held == kMissing) held = kResident;
      else victims.push_back(slot(place));
    }
    const int64_t per_page = int64_t(a.num_layers) * a.num_kv_heads;
    size_t next = 0;
    for (int32_t c : selected) {
      if (state[size_t(c)] == kResident) continue;
      const int64_t linear = int64_t(a.host_rank[head]) * (num_chunks / in_page) + c / in_page;
      const int64_t page = int64_t(a.host_pages[row * a.max_host_pages + linear / per_page]) * per_page + linear % per_page;
      const char* segment = reinterpret_cast<const char*>(a.host_segments[page / a.segment_pages]);
      const int64_t src = page % a.segment_pages * in_page + c % in_page;
      const int64_t dst = victims[next++];
      for (int64_t i = 0; i < a.chunk_size; ++i) {
        const int64_t row = (dst * a.chunk_size + i) * D;
        read_record(segment + (src * a.chunk_size + i) * a.record_bytes, static_cast<Storage*>(a.k_flat) + row,
                    static_cast<Storage*>(a.v_flat) + row);
      }
      a.held_chunks[dst] = c;
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
    const int64_t head = (row * a.num_layers + a.layer_idx) * a.num_kv_heads + e % a.num_kv_heads;
    if (a.num_pages[row] == 0 || !a.is_dynamic[head]) continue;
    const int64_t in_page = a.page_size / a.chunk_size;
    const DynamicHead<T, D> dynamic{a, row, head, a.num_prompt_pages[row] * in_page, a.num_head_pages[head] * in_page};
    std::vector<float> scores(size_t(dynamic.num_chunks));
    dynamic.score(static_cast<const typename T::Storage*>(a.q) + e * group * D, group, scores);
    dynamic.favour_resident(scores);
    chosen += dynamic.num_selected - dynamic.force(scores);
    moved += dynamic.fetch(dynamic.select(scores));
  }
  a.counters[0] += chosen;
  a.counters[1] += chosen - moved;
}

}  // namespace HK_NAMESPACE
