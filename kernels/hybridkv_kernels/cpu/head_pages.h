// Where a request's head pages and its chunk summaries lie in the pool; head_pages.py says why.
#pragma once
#include <cstdint>

namespace HK_NAMESPACE {

// Row of the pool's head-page view for linear index `linear` of the request in `row` of the table.
template <typename Args>
static inline int64_t head_page(const Args& a, int64_t row, int64_t linear) {
  const int64_t per_page = int64_t(a.num_layers) * a.num_kv_heads, inside = linear % per_page;
  const int64_t page = a.pages[row * a.max_pages + linear / per_page];
  return ((inside / a.num_kv_heads) * a.pages_per_layer + page) * a.num_kv_heads + inside % a.num_kv_heads;
}

// Summary vectors of one dynamic head: K page, V page, next K page. It keeps the address of the half that it read last,
// which saves work to those who read in order.
template <typename Storage, int D, typename Args>
struct Summaries {
  const Args& a;
  int64_t row, head;
  int64_t half = -1;
  const Storage* rows = nullptr;

  const Storage* operator()(int64_t vector) {
    const int64_t wanted = vector / a.page_size;
    if (wanted != half) {
      const int64_t page = head_page(a, row, a.first_summary_page[head] + wanted / 2);
      rows = static_cast<const Storage*>(wanted % 2 ? a.v_flat : a.k_flat) + page * a.page_size * D;
      half = wanted;
    }
    return rows + (vector - wanted * a.page_size) * D;
  }
};

}  // namespace HK_NAMESPACE
