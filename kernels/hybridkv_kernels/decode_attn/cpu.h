// Decode attention over head pages, the dense tail and the estimated chunks, one pass, ragged over requests and heads.
#pragma once
#include "../cpu/args.h"
#include "../cpu/head_pages.h"
#include "../cpu/vec.h"

namespace HK_NAMESPACE {

// Running softmax of one split of one (request, KV head): G queries share every key and value row.
template <typename T, int D>
struct Split {
  int num_queries;
  const float* q;  // [G, D], scaled
  float* acc;      // [G, D]
  float* max;      // [G]
  float* sum;      // [G]

  // `key(i)` and `value(i)` give the address of row i; `bonus` is added to every logit.
  template <typename Key, typename Value>
  void attend(int64_t begin, int64_t end, Key key, Value value, float bonus = 0.f) {
    constexpr int kBlock = 32;
    alignas(64) float kv[D];
    float score[kBlock * kMaxGroup];
    for (int64_t start = begin; start < end; start += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, end - start));
      for (int i = 0; i < n; ++i) {
        load_row<T, D>(key(start + i), kv);
        for (int g = 0; g < num_queries; ++g) score[g * kBlock + i] = dot<D>(q + g * D, kv) + bonus;
      }
      for (int g = 0; g < num_queries; ++g) {
        float* s = score + g * kBlock;
        float top = max[g];
        for (int i = 0; i < n; ++i) top = std::max(top, s[i]);
        if (top == -std::numeric_limits<float>::infinity()) {  // no row of this block counts
          std::fill(s, s + n, 0.f);
          continue;
        }
        const float keep = std::exp(max[g] - top);
        float added = 0.f;
        for (int i = 0; i < n; ++i) added += s[i] = std::exp(s[i] - top);
        sum[g] = sum[g] * keep + added;
        max[g] = top;
        if (keep != 1.f) {
          float* a = acc + g * D;
#pragma omp simd
          for (int d = 0; d < D; ++d) a[d] *= keep;
        }
      }
      for (int i = 0; i < n; ++i) {
        load_row<T, D>(value(start + i), kv);
        for (int g = 0; g < num_queries; ++g) {
          const float p = score[g * kBlock + i];
          float* a = acc + g * D;
#pragma omp simd
          for (int d = 0; d < D; ++d) a[d] += p * kv[d];
        }
      }
    }
  }
};

// One unit of work: rows [begin, end) of the compressed rows, the tail and the mean rows of the estimated chunks of one
// (request, KV head), in this order.
struct Work {
  int32_t request, kv_head;
  int64_t begin, end;
};

// Chunks, ascending, of one dynamic head of the request in `row` that its buffer does not hold.
static inline std::vector<int32_t> absent_chunks(const DecodeArgs& a, int64_t row, int64_t head) {
  std::vector<uint8_t> is_resident(size_t(a.num_prompt_pages[row]), 0);
  for (int64_t place = 0; place < a.num_head_pages[head]; ++place)
    is_resident[size_t(a.held_chunks[head_page(a, row, a.first_head_page[head] + place)])] = 1;
  std::vector<int32_t> absent;
  absent.reserve(is_resident.size());
  for (size_t c = 0; c < is_resident.size(); ++c)
    if (!is_resident[c]) absent.push_back(int32_t(c));
  return absent;
}

template <typename T, int D>
void decode_attn(const DecodeArgs& a) {
  using Storage = typename T::Storage;
  const auto *k_pages = static_cast<const Storage*>(a.k_flat), *v_pages = static_cast<const Storage*>(a.v_flat);
  const int64_t layer_offset = int64_t(a.layer_idx) * a.pages_per_layer * a.page_size * a.num_kv_heads * D;
  const Storage *k_rows = k_pages + layer_offset, *v_rows = v_pages + layer_offset;
  const int group = a.num_q_heads / a.num_kv_heads;
  const int64_t vectors = a.num_means;

  std::vector<std::vector<int32_t>> absent(size_t(a.batch) * a.num_kv_heads);
#pragma omp parallel for schedule(dynamic) num_threads(a.num_threads) if (vectors > 0)
  for (int64_t e = 0; e < int64_t(absent.size()); ++e) {
    const int64_t row = a.req_rows[e / a.num_kv_heads];
    const int64_t head = (row * a.num_layers + a.layer_idx) * a.num_kv_heads + e % a.num_kv_heads;
    if (vectors > 0 && a.num_pages[row] > 0 && a.is_dynamic[head]) absent[size_t(e)] = absent_chunks(a, row, head);
  }

  std::vector<Work> work;
  std::vector<int64_t> first_work(size_t(a.batch) * a.num_kv_heads + 1, 0);
  for (int b = 0; b < a.batch; ++b) {
    const int64_t row = a.req_rows[b];
    for (int h = 0; h < a.num_kv_heads; ++h) {
      const int64_t head = (row * a.num_layers + a.layer_idx) * a.num_kv_heads + h;
      const int64_t kept = a.num_pages[row] > 0 ? int64_t(a.num_head_pages[head]) * a.page_size : 0;
      const int64_t estimated = int64_t(absent[size_t(b) * a.num_kv_heads + h].size()) * vectors;
      const int64_t exact = kept + a.seq_lens[b] - a.covered[row], total = exact + estimated;
      const int64_t first = a.window > 0 ? std::max<int64_t>(exact - a.window, 0) : 0;
      for (int64_t t = first; t < total; t += a.split_rows)
        work.push_back({b, h, t, std::min<int64_t>(t + a.split_rows, total)});
      first_work[size_t(b) * a.num_kv_heads + h + 1] = int64_t(work.size());
    }
  }
  const int64_t num_work = int64_t(work.size());
  std::vector<float> acc(size_t(num_work) * group * D), max(size_t(num_work) * group), sum(size_t(num_work) * group);

#pragma omp parallel for schedule(dynamic) num_threads(a.num_threads)
  for (int64_t w = 0; w < num_work; ++w) {
    const Work unit = work[size_t(w)];
    const int64_t row = a.req_rows[unit.request];
    const int64_t head = (row * a.num_layers + a.layer_idx) * a.num_kv_heads + unit.kv_head;
    const int64_t kept = a.num_pages[row] > 0 ? int64_t(a.num_head_pages[head]) * a.page_size : 0;
    alignas(64) float q[kMaxGroup * D];
    const auto* q_src = static_cast<const Storage*>(a.q) +
                        (int64_t(unit.request) * a.num_q_heads + int64_t(unit.kv_head) * group) * D;
    for (int i = 0; i < group * D; ++i) q[i] = T::load(q_src[i]) * a.scaling;
    Split<T, D> split{group, q, &acc[size_t(w) * group * D], &max[size_t(w) * group], &sum[size_t(w) * group]};
    for (int g = 0; g < group; ++g) split.max[g] = -std::numeric_limits<float>::infinity();

    // The rows are read page by page, so that the address arithmetic is done once a page.
    for (int64_t i = unit.begin; i < std::min(unit.end, kept);) {
      const int64_t place = i / a.page_size, stop = std::min({(place + 1) * a.page_size, unit.end, kept});
      const int64_t base = (head_page(a, row, a.first_head_page[head] + place) - place) * a.page_size * D;
      split.attend(i, stop, [&](int64_t r) { return k_pages + base + r * D; },
                   [&](int64_t r) { return v_pages + base + r * D; });
      i = stop;
    }
    const int64_t exact = kept + a.seq_lens[unit.request] - a.covered[row];
    const int32_t* slots = a.req_to_token + row * a.max_context + a.covered[row] - kept;
    const auto tail_row = [&](int64_t i) { return (int64_t(slots[i]) * a.num_kv_heads + unit.kv_head) * D; };
    split.attend(std::max(unit.begin, kept), std::min(unit.end, exact), [&](int64_t i) { return k_rows + tail_row(i); },
                 [&](int64_t i) { return v_rows + tail_row(i); });
    if (unit.end <= exact) continue;
    const auto& chunks = absent[size_t(unit.request) * a.num_kv_heads + unit.kv_head];
    const auto mean_key = [&](int64_t i) {
      const int64_t part = i - exact, chunk = chunks[size_t(part / vectors)];
      return chunk * 2 * vectors + part % vectors;
    };
    Summaries<Storage, D, DecodeArgs> keys{a, row, head}, values{a, row, head};
    // A mean stands for this many equal logits, whose sum of exponentials is exp(logit + log(tokens)).
    const float bonus = std::log(float(a.page_size) / float(vectors));
    split.attend(std::max(unit.begin, exact), unit.end, [&](int64_t i) { return keys(mean_key(i)); },
                 [&](int64_t i) { return values(mean_key(i) + vectors); }, bonus);
  }

  auto* out = static_cast<Storage*>(a.out);
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t e = 0; e < int64_t(a.batch) * a.num_kv_heads; ++e)
    for (int g = 0; g < group; ++g) {
      float top = -std::numeric_limits<float>::infinity(), total = 0.f;
      alignas(64) float merged[D] = {};
      for (int64_t w = first_work[size_t(e)]; w < first_work[size_t(e) + 1]; ++w)
        top = std::max(top, max[size_t(w) * group + g]);
      for (int64_t w = first_work[size_t(e)]; w < first_work[size_t(e) + 1]; ++w) {
        const float factor = std::exp(max[size_t(w) * group + g] - top);
        total += factor * sum[size_t(w) * group + g];
        const float* part = &acc[(size_t(w) * group + g) * D];
        for (int d = 0; d < D; ++d) merged[d] += factor * part[d];
      }
      for (int d = 0; d < D; ++d) out[(e * group + g) * D + d] = T::store(merged[d] / total);
    }
}

}  // namespace HK_NAMESPACE
