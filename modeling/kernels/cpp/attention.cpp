// Attention of many queries over a piece of keys, in bfloat16 with AVX512-BF16, on CPU.
//
// One task is one KV head and a stretch of queries, with all query heads that share it:
//   for each block of kKeys keys: K and V are packed in pairs, as VDPBF16PS wants them, and then,
//   for each kRows rows of queries:
//     scores (registers) -> running maximum and sum -> weights in bf16 -> weighted sum of V
// (the online softmax of Milakov and Gimelshein, arXiv 1805.02867; the blocking of FlashAttention-2,
// arXiv 2307.08691). What a row gets depends on its own query and the keys alone, never on the other
// rows or on the number of threads.
//
// torch's own op computes bf16 in fp32 on CPUs without AMX; this is for those.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_AVX512_BF16 1
#else
#define HAS_AVX512_BF16 0
#endif

extern "C" struct AttentionArgs {  // mirrored in native_attention.py; strides in elements
  const void* q;                   // [num_queries, num_heads, head_dim], last stride 1
  const void* k;                   // [num_keys, num_kv_heads, head_dim], last stride 1
  const void* v;
  void* out;   // [num_queries, num_heads, head_dim], contiguous
  float* lse;  // [num_queries, num_heads], contiguous
  int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride;
  int64_t is_causal;  // query i sees the keys up to i
  int64_t num_threads;
  double scale;
};

extern "C" int has_fast_bfloat16() { return HAS_AVX512_BF16; }

#if HAS_AVX512_BF16

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;
constexpr int kRows = 6;      // of queries in registers: 6 x 4 sums, 4 vectors of keys
constexpr int kColumns = 64;  // keys, or dimensions, of one pass over those
constexpr int kKeys = 256;
constexpr int64_t kQueries = 192;  // of one task; a multiple of kRows

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// What one thread works in.
struct Scratch {
  explicit Scratch(const AttentionArgs& a)
      : keys(a.head_dim / 2 * kKeys), values(kKeys / 2 * a.head_dim) {
    const int64_t num_rows = std::min(kQueries, a.num_queries) * (a.num_heads / a.num_kv_heads);
    acc.resize(num_rows * a.head_dim);
    max.resize(num_rows);
    sum.resize(num_rows);
  }
  std::vector<uint32_t> keys;    // [head_dim / 2, kKeys]: two dimensions of a key
  std::vector<uint32_t> values;  // [kKeys / 2, head_dim]: a dimension of two keys
  std::vector<float> acc;        // [rows, head_dim]
  std::vector<float> max, sum;   // [rows]
  alignas(64) float scores[kRows * kKeys];
  alignas(64) bf16 weights[kRows * kKeys];
};

// e^x for x <= 0 to 2 ulp, 0 below -87: x = n ln2 + r, a polynomial for e^r (Cephes expf).
inline __m512 exp_negative(__m512 x) {
  const __mmask16 is_some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(is_some, p, n);
}

inline float exp_negative(float x) {
  return _mm512_cvtss_f32(exp_negative(_mm512_set1_ps(x)));
}

// The keys from `first` on, dimension pair by dimension pair; what is past the last one is 0.
void pack_keys(const AttentionArgs& a, const bf16* k, int count, uint32_t* packed) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i steps = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(a.k_stride)));
  for (int i = 0; i < kKeys; i += kLanes) {
    const int rest = std::max(0, std::min(kLanes, count - i));
    const __mmask16 mask = static_cast<__mmask16>((1u << rest) - 1);
    const bf16* row = k + i * a.k_stride;
    for (int64_t pair = 0; pair < a.head_dim / 2; pair++) {
      const __m512i words = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, steps,
                                                        row + 2 * pair, sizeof(bf16));
      _mm512_storeu_si512(packed + pair * kKeys + i, words);
    }
  }
}

// The values, key pair by key pair; what is past the last one is 0.
void pack_values(const AttentionArgs& a, const bf16* v, int count, uint32_t* packed) {
  for (int i = 0; i < kKeys; i += 2, packed += a.head_dim) {
    for (int64_t dim = 0; dim < a.head_dim; dim += kLanes) {
      __m512i low = _mm512_setzero_si512(), high = low;
      const bf16* row = v + i * a.v_stride + dim;
      if (i < count)
        low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      if (i + 1 < count)
        high = _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + a.v_stride)));
      _mm512_storeu_si512(packed + dim, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// sums[r][j] += left[r, i] right[i, j] over `count` pairs i; kRowCount x kVectors registers.
template <int kRowCount, int kVectors>
inline void multiply(const bf16* left, int64_t left_stride, const uint32_t* right,
                     int64_t right_stride, int64_t count, __m512 (&sums)[kRowCount][kVectors]) {
  for (int64_t i = 0; i < count; i++) {
    __m512bh columns[kVectors];
    for (int j = 0; j < kVectors; j++)
      columns[j] = (__m512bh)_mm512_loadu_si512(right + i * right_stride + j * kLanes);
    for (int r = 0; r < kRowCount; r++) {
      int32_t pair;
      std::memcpy(&pair, left + r * left_stride + 2 * i, sizeof(pair));
      const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < kVectors; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], row, columns[j]);
    }
  }
}

// Scaled scores of kRowCount rows for the first `width` keys of the block, a multiple of kColumns.
template <int kRowCount>
void score(const AttentionArgs& a, const bf16* q, Scratch& s, int width) {
  const __m512 scale = _mm512_set1_ps(static_cast<float>(a.scale));
  for (int column = 0; column < width; column += kColumns) {
    __m512 sums[kRowCount][4];
    for (auto& row : sums)
      for (__m512& sum : row) sum = _mm512_setzero_ps();
    multiply<kRowCount, 4>(q, a.q_stride, &s.keys[column], kKeys, a.head_dim / 2, sums);
    for (int r = 0; r < kRowCount; r++)
      for (int j = 0; j < 4; j++)
        _mm512_store_ps(&s.scores[r * kKeys + column + j * kLanes],
                        _mm512_mul_ps(sums[r][j], scale));
  }
}

// Turns one row's scores into weights; `count` of its keys are seen. Returns by how much what was
// summed before is to be multiplied.
float soften(Scratch& s, int r, int64_t row, int count, int width) {
  float* x = &s.scores[r * kKeys];
  __m512 tops = _mm512_set1_ps(kMinusInf);
  for (int i = 0; i < width; i += kLanes) {
    const int rest = std::max(0, std::min(kLanes, count - i));
    const __mmask16 mask = static_cast<__mmask16>((1u << rest) - 1);
    const __m512 seen = _mm512_mask_mov_ps(_mm512_set1_ps(kMinusInf), mask, _mm512_load_ps(x + i));
    _mm512_store_ps(x + i, seen);
    tops = _mm512_max_ps(tops, seen);
  }
  const float top = std::max(s.max[row], _mm512_reduce_max_ps(tops));
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < width; i += kLanes) {
    const __m512 weight =
        exp_negative(_mm512_sub_ps(_mm512_load_ps(x + i), _mm512_set1_ps(top)));
    total = _mm512_add_ps(total, weight);
    _mm256_store_si256(reinterpret_cast<__m256i*>(&s.weights[r * kKeys + i]),
                       (__m256i)_mm512_cvtneps_pbh(weight));
  }
  const float kept = exp_negative(s.max[row] - top);
  s.sum[row] = s.sum[row] * kept + _mm512_reduce_add_ps(total);
  s.max[row] = top;
  return kept;
}

// acc = kept acc + weights V, for kRowCount rows and kVectors * 16 dimensions from `dim` on.
template <int kRowCount, int kVectors>
void accumulate(const AttentionArgs& a, Scratch& s, int64_t first_row, int64_t dim,
                const float* kept, int width) {
  __m512 sums[kRowCount][kVectors];
  float* acc = &s.acc[first_row * a.head_dim + dim];
  for (int r = 0; r < kRowCount; r++)
    for (int j = 0; j < kVectors; j++)
      sums[r][j] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * a.head_dim + j * kLanes),
                                 _mm512_set1_ps(kept[r]));
  multiply<kRowCount, kVectors>(s.weights, kKeys, &s.values[dim], a.head_dim, width / 2, sums);
  for (int r = 0; r < kRowCount; r++)
    for (int j = 0; j < kVectors; j++)
      _mm512_storeu_ps(acc + r * a.head_dim + j * kLanes, sums[r][j]);
}

// kRowCount queries of one head against the packed block of keys from `first_key` on.
template <int kRowCount>
void attend_rows(const AttentionArgs& a, const bf16* q, Scratch& s, int64_t first_row,
                 int64_t first_query, int64_t first_key, int count) {
  int counts[kRowCount], most = 0;
  for (int r = 0; r < kRowCount; r++) {
    const int64_t seen = a.is_causal ? first_query + r + 1 - first_key : count;
    counts[r] = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(count, seen)));
    most = std::max(most, counts[r]);
  }
  if (most == 0) return;
  const int width = (most + kColumns - 1) / kColumns * kColumns;
  score<kRowCount>(a, q, s, width);
  float kept[kRowCount];
  for (int r = 0; r < kRowCount; r++)
    kept[r] = counts[r] ? soften(s, r, first_row + r, counts[r], width) : 1.0f;
  for (int r = 0; r < kRowCount; r++)
    if (counts[r] == 0) std::fill_n(&s.weights[r * kKeys], width, bf16{0});
  int64_t dim = 0;
  for (; dim + 64 <= a.head_dim; dim += 64)
    accumulate<kRowCount, 4>(a, s, first_row, dim, kept, width);
  for (; dim < a.head_dim; dim += kLanes)
    accumulate<kRowCount, 1>(a, s, first_row, dim, kept, width);
}

void attend_stretch(const AttentionArgs& a, int64_t kv_head, int64_t first_query, Scratch& s) {
  const int64_t num_queries = std::min(kQueries, a.num_queries - first_query);
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t num_rows = num_queries * group;
  std::fill_n(s.acc.begin(), num_rows * a.head_dim, 0.0f);
  std::fill_n(s.max.begin(), num_rows, kMinusInf);
  std::fill_n(s.sum.begin(), num_rows, 0.0f);
  const int64_t last_key = a.is_causal ? first_query + num_queries : a.num_keys;
  const int64_t end = std::min(a.num_keys, last_key);
  for (int64_t first_key = 0; first_key < end; first_key += kKeys) {
    const int count = static_cast<int>(std::min<int64_t>(kKeys, a.num_keys - first_key));
    pack_keys(a, static_cast<const bf16*>(a.k) + first_key * a.k_stride + kv_head * a.k_head_stride,
              count, s.keys.data());
    pack_values(a,
                static_cast<const bf16*>(a.v) + first_key * a.v_stride + kv_head * a.v_head_stride,
                count, s.values.data());
    for (int64_t g = 0; g < group; g++) {
      const bf16* q = static_cast<const bf16*>(a.q) + first_query * a.q_stride +
                      (kv_head * group + g) * a.q_head_stride;
      int64_t i = 0;
      for (; i + kRows <= num_queries; i += kRows)
        attend_rows<kRows>(a, q + i * a.q_stride, s, g * num_queries + i, first_query + i,
                           first_key, count);
      for (; i < num_queries; i++)
        attend_rows<1>(a, q + i * a.q_stride, s, g * num_queries + i, first_query + i, first_key,
                       count);
    }
  }
  for (int64_t g = 0; g < group; g++)
    for (int64_t i = 0; i < num_queries; i++) {
      const int64_t row = g * num_queries + i;
      const int64_t to = (first_query + i) * a.num_heads + kv_head * group + g;
      const __m512 inverse = _mm512_set1_ps(1.0f / s.sum[row]);
      bf16* out = static_cast<bf16*>(a.out) + to * a.head_dim;
      for (int64_t dim = 0; dim < a.head_dim; dim += kLanes) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(&s.acc[row * a.head_dim + dim]), inverse);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + dim), (__m256i)_mm512_cvtneps_pbh(x));
      }
      a.lse[to] = s.max[row] + std::log(s.sum[row]);
    }
}

}  // namespace

// -1: these sizes are for another kernel, and nothing was computed.
extern "C" int attend(const AttentionArgs* args) {
  const AttentionArgs& a = *args;
  if (a.head_dim % kLanes || a.num_queries < 1 || a.num_keys < 1) return -1;
  if (a.k_stride * kLanes > std::numeric_limits<int32_t>::max()) return -1;
  if (a.is_causal && a.num_queries != a.num_keys) return -1;
  const int64_t num_stretches = (a.num_queries + kQueries - 1) / kQueries;
  const int64_t num_tasks = num_stretches * a.num_kv_heads;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    Scratch s(a);
    for (int64_t task; (task = next.fetch_add(1)) < num_tasks;) {
      // The last stretches have the most keys: they come first, so that no thread waits for one.
      const int64_t stretch = num_stretches - 1 - task / a.num_kv_heads;
      attend_stretch(a, task % a.num_kv_heads, stretch * kQueries, s);
    }
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min(a.num_threads, num_tasks); i++) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return 0;
}

#else

extern "C" int attend(const AttentionArgs*) { return -1; }

#endif
