// Plain arguments of the kernels: what ctypes fills in. All pointers are owned by the caller.
#pragma once
#include <cstdint>

constexpr int kMaxGroup = 16;
constexpr int kCodedTokens = 8, kCodeHeader = 2;  // of codes; chunks.py says what they are

extern "C" {

enum HkType : int32_t { HK_FLOAT32 = 0, HK_BFLOAT16 = 1, HK_FLOAT16 = 2 };

struct DecodeArgs {
  const void* q;                  // [batch, num_q_heads, D]
  void* out;                      // [batch, num_q_heads, D]
  const void *k_flat, *v_flat;    // pool, [num_layers * pages_per_layer * page_size * num_kv_heads, D]
  const int32_t* pages;           // [rows, max_pages]
  const int32_t* num_pages;       // [rows]
  const int32_t* covered;         // [rows]
  const int32_t* first_head_page; // [rows, num_layers, num_kv_heads]
  const int32_t* num_head_pages;  // [rows, num_layers, num_kv_heads]
  const int32_t* num_prompt_pages; // [rows]; this and the next three are read where chunks are estimated, as pages
  const int32_t* first_summary_page; // [rows, num_layers, num_kv_heads]
  const uint8_t* is_dynamic;      // [rows, num_layers, num_kv_heads]
  const int32_t* held_chunks;        // [head pages]
  const int32_t* req_to_token;    // [rows, max_context]
  const int64_t* req_rows;        // [batch]
  const int64_t* seq_lens;        // [batch]
  int64_t max_pages, max_context, split_rows;
  int32_t batch, num_q_heads, num_kv_heads, num_layers, pages_per_layer, page_size, layer_idx, head_dim;
  int32_t type, num_threads;
  int32_t num_means;              // mean keys a chunk, followed by as many mean values; 0: nothing is estimated
  int32_t window;                 // rows of a head that count, its last ones; 0: all
  float scaling;
};

enum HkChunkScore : int32_t {
  HK_MEAN_MAX = 0,
  HK_MEAN_MEAN = 1,
  HK_QUEST = 2,
  HK_ARKVALE = 3,
  HK_MEAN2_MAX = 4,
  HK_MEAN4_MAX = 5,
  HK_KEY_CODES = 7,  // 6, mean_spread, arrives as HK_MEAN_MAX with another query
  HK_HALF_CODES = 8
};

enum HkHostDtype : int32_t { HK_SAME = 0, HK_INT8 = 1 };  // host_pages.py says what they are

struct RetrieveArgs {
  const void* q;                     // [batch, num_q_heads, D]
  void *k_flat, *v_flat;             // pool, in place
  const int64_t* host_segments;      // addresses of the host store's segments, [segment_pages, page_size, record_bytes]
  int32_t* held_chunks;              // [head pages, page_size / chunk_size], in place
  int64_t* counters;                 // [2], in place
  const int32_t *pages, *host_pages; // [rows, max_pages], [rows, max_host_pages]
  const int32_t *num_pages, *num_prompt_pages;                             // [rows]
  const int32_t *first_head_page, *num_head_pages, *first_summary_page, *host_rank; // [rows, num_layers, num_kv_heads]
  const uint8_t* is_dynamic;         // [rows, num_layers, num_kv_heads]
  const int64_t* req_rows;           // [batch]
  int64_t max_pages, max_host_pages, segment_pages;
  int32_t batch, num_q_heads, num_kv_heads, num_layers, pages_per_layer, page_size, layer_idx, head_dim;
  int32_t type, num_threads, chunk_score, chunk_size, score_vectors, stored_vectors, num_sink_chunks, num_recent_chunks;
  int32_t record_bytes, host_dtype;
  float hysteresis;                  // added to the scores of resident chunks
};

enum HkStatistic : int32_t {
  HK_SPARSITY = 0, HK_TOP_MASS = 1, HK_HIT_CV = 2, HK_STABILITY = 3, HK_CAPTURE = 4, HK_WORST_CAPTURE = 5
};

struct ScoreArgs {
  const void* q;            // [num_rows, num_q_heads, D]
  const void* k;            // [tokens or slots, num_kv_heads, D]
  const int64_t* slots;     // [num_tokens], or null: token i is row i of k
  const int32_t* statistics; // [num_statistics], numbers of HK_SPARSITY and so on
  float* out_statistic;     // [num_kv_heads, num_statistics]
  float* out_salience;      // [num_kv_heads, num_tokens]
  int64_t num_tokens, low_rank, high_rank, num_captured;
  int32_t num_rows, num_q_heads, num_kv_heads, head_dim, type, num_threads, num_statistics, chunk_size;
  int32_t num_sinks, num_recent;
  float scaling, sparsity_fraction, mass_fraction, hit_level;
};

struct CompactArgs {
  char *k, *v;              // pool rows, in place
  const int64_t *src, *dst; // [num_rows]; a negative src: no row
  int64_t num_rows, k_row_bytes, v_row_bytes;
  int32_t num_threads;
};
}

struct SelectArgs {
  const float* score;            // [num_entries, num_tokens]
  const int64_t* num_selected;   // [num_entries]
  const uint8_t* tier;           // [num_entries, num_tokens], or one row for all: stride 0; or null
  uint8_t* out;                  // [num_entries, num_tokens]
  int64_t num_entries, num_tokens, tier_stride, num_first, num_last;
  int32_t num_threads;
};
