// C interface of the CPU kernels: chooses the instruction set at run time. Loaded with ctypes, so that it depends on
// neither Python's nor torch's binary interface.
#include <cstring>

#include "../select_tokens/cpu.h"
#include "args.h"

#define HK_DECLARE(isa)              \
  namespace isa {                    \
  bool decode(const DecodeArgs&);    \
  bool retrieve(const RetrieveArgs&); \
  bool score(const ScoreArgs&);      \
  }
HK_DECLARE(hk_scalar)
#if defined(__x86_64__)
HK_DECLARE(hk_avx2)
HK_DECLARE(hk_avx512)
#endif

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__)
#define HK_CALL(function)                                 \
  if (isa == kAvx512) return hk_avx512::function(*args);  \
  if (isa == kAvx2) return hk_avx2::function(*args);      \
  return hk_scalar::function(*args);
#else
#define HK_CALL(function) return hk_scalar::function(*args);
#endif

extern "C" {

// Best instruction set of this machine.
int32_t hk_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kScalar;
}

// 1 when done, 0 when there is no kernel for this element type or head size.
int32_t hk_decode(const DecodeArgs* args, [[maybe_unused]] int32_t isa) { HK_CALL(decode) }
int32_t hk_score(const ScoreArgs* args, [[maybe_unused]] int32_t isa) { HK_CALL(score) }
int32_t hk_retrieve(const RetrieveArgs* args, [[maybe_unused]] int32_t isa) { HK_CALL(retrieve) }

// Rows are copied as bytes, so one kernel serves every element type, head size and instruction set.
int32_t hk_compact(const CompactArgs* args, int32_t) {
#pragma omp parallel for schedule(static) num_threads(args->num_threads)
  for (int64_t i = 0; i < args->num_rows; ++i) {
    if (args->src[i] < 0) continue;
    std::memcpy(args->k + args->dst[i] * args->k_row_bytes, args->k + args->src[i] * args->k_row_bytes,
                size_t(args->k_row_bytes));
    std::memcpy(args->v + args->dst[i] * args->v_row_bytes, args->v + args->src[i] * args->v_row_bytes,
                size_t(args->v_row_bytes));
  }
  return 1;
}

// A selection compares integers, and is limited by memory: one kernel serves every instruction set.
int32_t hk_select(const SelectArgs* args, int32_t) {
  selection::select(*args);
  return 1;
}
}
