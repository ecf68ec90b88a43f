// Attention of one query per sequence over its paged KV, on CPU.
//
// One task is one KV head of one sequence, with all query heads that share it:
//   for each tile of kTile keys, in order of position:
//     scores of every query head -> running maximum and sum -> weighted sum of V rows
// (the online softmax of Milakov and Gimelshein, arXiv 1805.02867). The order of additions depends
// on the sequence alone, never on the batch or on the number of threads.
//
// bf16 with AVX512-BF16 has a path of its own; everything else is plain C++ for the vectoriser.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_AVX512_BF16 1
#else
#define HAS_AVX512_BF16 0
#endif

extern "C" struct PagedDecodeArgs {  // mirrored in cpu_attention.py; strides in elements
  const void* q;                     // [num_seqs, num_heads, head_dim]
  const void* pool;                  // one layer, [num_blocks, num_kv_heads, 2, block_size, head_dim]
  void* out;                         // [num_seqs, num_heads, head_dim], contiguous
  float* lse;                        // [num_seqs, num_heads], contiguous
  const int32_t* block_tables;       // [num_seqs, max_blocks]
  const int32_t* context_lens;       // [num_seqs]
  int64_t num_seqs, num_heads, num_kv_heads, head_dim, block_size, num_blocks;
  int64_t q_seq_stride, q_head_stride, table_stride;
  int64_t max_blocks;  // columns of block_tables
  int64_t block_stride, head_stride, value_offset;
  int64_t window;  // 0: none
  int64_t is_bfloat16;
  int64_t num_threads;
  double scale;
};

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;
constexpr int kTile = 128;
constexpr int64_t kBytesPerThread = 1 << 20;  // below that, starting a thread costs more than it saves

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = static_cast<bf16>(is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x for x <= 0 to 2 ulp: x = n ln2 + r, |r| <= ln2 / 2, a polynomial for e^r (Cephes expf).
inline float exp_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// What one thread works in. A tile's rows are padded to whole vectors by repeating the last one;
// the weights of the padding are 0.
template <typename T>
struct Scratch {
  const T* k_rows[kTile];
  const T* next_rows[kTile];  // of the tile after this one, to be prefetched
  std::vector<float> q;       // [group, head_dim]
  std::vector<float> scores;  // [group, kTile], then the weights
  std::vector<float> acc;     // [group, head_dim]
  std::vector<float> max, sum;
};

// 16 floats, in whatever registers the CPU has; GCC and Clang lower it on every architecture.
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vector load(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }

// The hardware prefetcher stops at the end of a page, and blocks are not much longer.
template <typename T>
inline void prefetch_row(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// Adds the weighted V rows of a tile to kHeads heads over kVectors * 16 dimensions: the sums stay
// in registers, and each row is loaded once for all heads.
template <typename T, int kHeads, int kVectors>
void add_rows(const PagedDecodeArgs& a, Scratch<T>& s, int first, int64_t dim, int padded) {
  Vector sums[kHeads][kVectors];
  float* acc = &s.acc[first * a.head_dim + dim];
  const float* weights = &s.scores[first * kTile];
  for (int g = 0; g < kHeads; g++)
    for (int j = 0; j < kVectors; j++) sums[g][j] = load(acc + g * a.head_dim + j * kLanes);
  for (int i = 0; i < padded; i++) {
    const T* v = s.k_rows[i] + a.value_offset + dim;
    if (first == 0) prefetch_row(s.next_rows[i] + a.value_offset + dim, kVectors * kLanes);
    Vector row[kVectors];
    for (int j = 0; j < kVectors; j++) row[j] = load(v + j * kLanes);
    for (int g = 0; g < kHeads; g++)
      for (int j = 0; j < kVectors; j++) sums[g][j] += weights[g * kTile + i] * row[j];
  }
  for (int g = 0; g < kHeads; g++)
    for (int j = 0; j < kVectors; j++) store(acc + g * a.head_dim + j * kLanes, sums[g][j]);
}

template <typename T, int kVectors>
void add_columns(const PagedDecodeArgs& a, Scratch<T>& s, int group, int64_t dim, int padded) {
  int g = 0;
  for (; g + 4 <= group; g += 4) add_rows<T, 4, kVectors>(a, s, g, dim, padded);
  for (; g + 2 <= group; g += 2) add_rows<T, 2, kVectors>(a, s, g, dim, padded);
  for (; g < group; g++) add_rows<T, 1, kVectors>(a, s, g, dim, padded);
}

template <typename T>
void accumulate(const PagedDecodeArgs& a, Scratch<T>& s, int group, int padded) {
  int64_t dim = 0;
  for (; dim + 4 * kLanes <= a.head_dim; dim += 4 * kLanes)
    add_columns<T, 4>(a, s, group, dim, padded);
  for (; dim + kLanes <= a.head_dim; dim += kLanes) add_columns<T, 1>(a, s, group, dim, padded);
  for (; dim < a.head_dim; dim++)
    for (int g = 0; g < group; g++)
      for (int i = 0; i < padded; i++)
        s.acc[g * a.head_dim + dim] +=
            s.scores[g * kTile + i] * to_float(s.k_rows[i][a.value_offset + dim]);
}

template <typename T>
struct Portable {
  static void scores(const PagedDecodeArgs& a, const T*, Scratch<T>& s, int group, int padded) {
    const int64_t dim = a.head_dim;
    const int64_t whole = dim / kLanes * kLanes;
    for (int i = 0; i < padded; i++) {
      const T* k = s.k_rows[i];
      prefetch_row(s.next_rows[i], dim);
      for (int g = 0; g < group; g++) {
        const float* q = &s.q[g * dim];
        Vector dots{};
        for (int64_t d = 0; d < whole; d += kLanes) dots += load(q + d) * load(k + d);
        float lanes[kLanes], dot = 0;
        store(lanes, dots);
#pragma omp simd reduction(+ : dot)
        for (int l = 0; l < kLanes; l++) dot += lanes[l];
        for (int64_t d = whole; d < dim; d++) dot += q[d] * to_float(k[d]);
        s.scores[g * kTile + i] = dot;
      }
    }
  }
};

#if HAS_AVX512_BF16

// Lane i of the result is the sum of all lanes of x[i].
inline __m512 reduce_16(const __m512* x) {
  __m512 pairs[8], quads[4], halves[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                             _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  for (int i = 0; i < 2; i++)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

template <int kDim>
struct Avx512 {
  static_assert(kDim % 32 == 0);
  static constexpr int kPairs = kDim / 32;  // vectors of 32 bf16

  static void scores(const PagedDecodeArgs& a, const bf16* q, Scratch<bf16>& s, int group,
                     int padded) {
    for (int i = 0; i < padded; i += kLanes) {
      for (int t = 0; t < kLanes; t++) prefetch_row(s.next_rows[i + t], kDim);
      for (int g = 0; g < group; g++) {
        const bf16* q_row = q + g * a.q_head_stride;
        __m512bh query[kPairs];
        for (int j = 0; j < kPairs; j++) query[j] = (__m512bh)_mm512_loadu_si512(q_row + j * 32);
        __m512 dots[kLanes];
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; t++) {
          const bf16* k = s.k_rows[i + t];
          __m512 dot = _mm512_setzero_ps();
          for (int j = 0; j < kPairs; j++)
            dot = _mm512_dpbf16_ps(dot, query[j], (__m512bh)_mm512_loadu_si512(k + j * 32));
          dots[t] = dot;
        }
        _mm512_storeu_ps(&s.scores[g * kTile + i], reduce_16(dots));
      }
    }
  }
};

#endif

// Turns a tile's scores into weights, and rescales what was summed before to the new maximum.
template <typename T>
void soften(const PagedDecodeArgs& a, Scratch<T>& s, int group, int count, int padded) {
  const float scale = static_cast<float>(a.scale);
  for (int g = 0; g < group; g++) {
    float* x = &s.scores[g * kTile];
    for (int i = count; i < padded; i++) x[i] = -std::numeric_limits<float>::infinity();
    float top = s.max[g];
#pragma omp simd reduction(max : top)
    for (int i = 0; i < padded; i++) {
      x[i] *= scale;
      top = x[i] > top ? x[i] : top;
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < padded; i++) {
      x[i] = exp_negative(x[i] - top);
      sum += x[i];
    }
    const float kept = exp_negative(s.max[g] - top);
    s.sum[g] = s.sum[g] * kept + sum;
    s.max[g] = top;
    if (kept != 1.0f)
      for (int64_t d = 0; d < a.head_dim; d++) s.acc[g * a.head_dim + d] *= kept;
  }
}

// Where the K rows of the tile from position `start` on lie; past the end, the last one again.
template <typename T>
void find_rows(const PagedDecodeArgs& a, const T* base, const int32_t* table, int64_t start,
               int64_t length, const T** rows) {
  const int count = static_cast<int>(std::min<int64_t>(kTile, length - start));
  for (int i = 0; i < count;) {  // block by block
    const int64_t offset = (start + i) % a.block_size;
    const T* row =
        base + table[(start + i) / a.block_size] * a.block_stride + offset * a.head_dim;
    const int end = static_cast<int>(std::min<int64_t>(count, i + a.block_size - offset));
    for (; i < end; i++, row += a.head_dim) rows[i] = row;
  }
  for (int i = count; i < kTile; i++) rows[i] = rows[count - 1];
}

template <typename T, typename Math>
void decode_one(const PagedDecodeArgs& a, int64_t seq, int64_t kv_head, Scratch<T>& s) {
  const int group = static_cast<int>(a.num_heads / a.num_kv_heads);
  const int64_t first_head = kv_head * group;
  const T* q = static_cast<const T*>(a.q) + seq * a.q_seq_stride + first_head * a.q_head_stride;
  for (int g = 0; g < group; g++)
    for (int64_t d = 0; d < a.head_dim; d++)
      s.q[g * a.head_dim + d] = to_float(q[g * a.q_head_stride + d]);
  std::fill(s.acc.begin(), s.acc.end(), 0.0f);
  std::fill(s.sum.begin(), s.sum.end(), 0.0f);
  std::fill(s.max.begin(), s.max.end(), -std::numeric_limits<float>::infinity());

  const int64_t length = a.context_lens[seq];
  const int64_t first = a.window > 0 ? std::max<int64_t>(0, length - a.window) : 0;
  const int32_t* table = a.block_tables + seq * a.table_stride;
  const T* base = static_cast<const T*>(a.pool) + kv_head * a.head_stride;
  find_rows(a, base, table, first, length, s.next_rows);
  for (int64_t start = first; start < length; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, length - start));
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    std::copy(s.next_rows, s.next_rows + kTile, s.k_rows);
    if (start + kTile < length) find_rows(a, base, table, start + kTile, length, s.next_rows);
    Math::scores(a, q, s, group, padded);
    soften(a, s, group, count, padded);
    accumulate(a, s, group, padded);
  }

  T* out = static_cast<T*>(a.out) + (seq * a.num_heads + first_head) * a.head_dim;
  for (int g = 0; g < group; g++) {
    const float inverse = 1.0f / s.sum[g];
    for (int64_t d = 0; d < a.head_dim; d++)
      from_float(s.acc[g * a.head_dim + d] * inverse, out + g * a.head_dim + d);
    a.lse[seq * a.num_heads + first_head + g] = s.max[g] + std::log(s.sum[g]);
  }
}

template <typename T, typename Math>
void decode_all(const PagedDecodeArgs& a) {
  const int64_t num_tasks = a.num_seqs * a.num_kv_heads;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    Scratch<T> s;
    const int64_t group = a.num_heads / a.num_kv_heads;
    s.q.resize(group * a.head_dim);
    s.acc.resize(group * a.head_dim);
    s.scores.resize(group * kTile);
    s.max.resize(group);
    s.sum.resize(group);
    for (int64_t task; (task = next.fetch_add(1)) < num_tasks;)
      decode_one<T, Math>(a, task / a.num_kv_heads, task % a.num_kv_heads, s);
  };
  int64_t num_keys = 0;
  for (int64_t b = 0; b < a.num_seqs; b++) {
    const int64_t length = a.context_lens[b];
    num_keys += a.window > 0 ? std::min(a.window, length) : length;
  }
  const int64_t num_bytes = num_keys * a.num_kv_heads * a.head_dim * 2 * sizeof(T);
  const int64_t num_threads =
      std::min({a.num_threads, num_tasks, num_bytes / kBytesPerThread + 1});
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < num_threads; i++) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

bool is_valid(const PagedDecodeArgs& a) {
  for (int64_t b = 0; b < a.num_seqs; b++) {
    const int64_t num_used = (a.context_lens[b] + a.block_size - 1) / a.block_size;
    if (a.context_lens[b] < 1 || num_used > a.max_blocks) return false;
    for (int64_t i = 0; i < num_used; i++) {
      const int32_t id = a.block_tables[b * a.table_stride + i];
      if (id < 0 || id >= a.num_blocks) return false;
    }
  }
  return true;
}

}  // namespace

extern "C" int has_fast_bfloat16() { return HAS_AVX512_BF16; }

// -1: a context length or block id is outside its range, and nothing was computed.
extern "C" int paged_decode(const PagedDecodeArgs* args) {
  const PagedDecodeArgs& a = *args;
  if (!is_valid(a)) return -1;
  if (!a.is_bfloat16) {
    decode_all<float, Portable<float>>(a);
    return 0;
  }
#if HAS_AVX512_BF16
  switch (a.head_dim) {
    case 32: decode_all<bf16, Avx512<32>>(a); return 0;
    case 64: decode_all<bf16, Avx512<64>>(a); return 0;
    case 96: decode_all<bf16, Avx512<96>>(a); return 0;
    case 128: decode_all<bf16, Avx512<128>>(a); return 0;
    case 256: decode_all<bf16, Avx512<256>>(a); return 0;
  }
#endif
  decode_all<bf16, Portable<bf16>>(a);
  return 0;
}
