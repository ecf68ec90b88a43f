// All-reduce and all-gather between the processes of one host, through POSIX shared memory.
//
//   [Header of rank 0][Header of rank 1]...      one cache line each
//   [rank 0, slot 0][rank 0, slot 1][rank 1, slot 0]...
//
// Round s, at every rank: write the own part into slot s % 2, publish s, wait until everybody has
// published s, read everybody's slot. Two slots are enough: nobody writes slot s % 2 again, in
// round s + 2, before all have published s + 1, which they do after having read round s.
//
// Sums run in fp32 in rank order, so every rank computes the same bits.

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

enum Result { kOk = 0, kTimeout = -1, kClosed = -2, kMismatch = -3 };

constexpr int kSpins = 2000;            // some tens of microseconds, then give the core away
constexpr int64_t kSliceNs = 20000000;  // between two looks at who has closed

struct alignas(64) Header {
  std::atomic<uint32_t> published;
  std::atomic<uint32_t> num_sleeping;
  std::atomic<uint32_t> closed;
  std::atomic<uint64_t> num_bytes[2];  // of the part in each slot
};
static_assert(sizeof(Header) == 64 && std::atomic<uint32_t>::is_always_lock_free);

struct Group {
  char* base;
  size_t mapped_bytes;
  int64_t slot_bytes;
  int rank, size;
  uint32_t round;
  int64_t timeout_ns;

  Header& header(int r) const { return reinterpret_cast<Header*>(base)[r]; }
  char* slot(int r, uint32_t s) const {
    return base + size * sizeof(Header) + (static_cast<int64_t>(r) * 2 + s % 2) * slot_bytes;
  }
};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, timeout, nullptr, 0);
}

bool has_reached(uint32_t published, uint32_t round) {
  return static_cast<int32_t>(published - round) >= 0;  // the counter may wrap
}

// The sleeper counts itself before it looks again, the publisher stores before it looks for
// sleepers: one of the two sees the other.
int wait_for(Group& group, int r) {
  Header& peer = group.header(r);
  for (int i = 0; i < kSpins; i++) {
    if (has_reached(peer.published.load(std::memory_order_acquire), group.round)) return kOk;
    pause_cpu();
  }
  const int64_t deadline = now_ns() + group.timeout_ns;
  const timespec slice{0, kSliceNs};
  int result = kTimeout;
  peer.num_sleeping.fetch_add(1);
  while (true) {
    const uint32_t seen = peer.published.load();
    if (has_reached(seen, group.round)) { result = kOk; break; }
    if (peer.closed.load()) {  // it may have published in between, then closed
      result = has_reached(peer.published.load(), group.round) ? kOk : kClosed;
      break;
    }
    if (now_ns() > deadline) break;
    futex(&peer.published, FUTEX_WAIT, seen, &slice);
  }
  peer.num_sleeping.fetch_sub(1);
  return result;
}

int exchange(Group& group, const char* part, int64_t num_bytes) {
  group.round++;
  Header& own = group.header(group.rank);
  std::memcpy(group.slot(group.rank, group.round), part, num_bytes);
  own.num_bytes[group.round % 2].store(num_bytes, std::memory_order_relaxed);
  own.published.store(group.round);
  if (own.num_sleeping.load()) futex(&own.published, FUTEX_WAKE, INT32_MAX, nullptr);
  for (int r = 0; r < group.size; r++) {
    if (r == group.rank) continue;
    if (const int result = wait_for(group, r)) return result;
    const uint64_t theirs = group.header(r).num_bytes[group.round % 2].load();
    if (theirs != static_cast<uint64_t>(num_bytes)) return kMismatch;
  }
  return kOk;
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, uint16_t* out) {  // to the nearest bf16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

template <typename T>
void sum_slots(const Group& group, T* out, int64_t count) {
  constexpr int64_t kTile = 1024;  // its sums stay in the first-level cache
  float sums[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t n = std::min(kTile, count - start);
    const T* first = reinterpret_cast<const T*>(group.slot(0, group.round)) + start;
    for (int64_t i = 0; i < n; i++) sums[i] = to_float(first[i]);
    for (int r = 1; r < group.size; r++) {
      const T* other = reinterpret_cast<const T*>(group.slot(r, group.round)) + start;
      for (int64_t i = 0; i < n; i++) sums[i] += to_float(other[i]);
    }
    for (int64_t i = 0; i < n; i++) from_float(sums[i], out + start + i);
  }
}

template <typename T>
int all_reduce(Group& group, T* x, int64_t count) {
  const int64_t step = group.slot_bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t start = 0; start < count; start += step) {
    const int64_t n = std::min(step, count - start);
    const int result = exchange(group, reinterpret_cast<char*>(x + start), n * sizeof(T));
    if (result) return result;
    sum_slots(group, x + start, n);
  }
  return kOk;
}

}  // namespace

extern "C" {

// Maps the region and, as its creator, makes it. Null when the memory cannot be had.
void* group_open(const char* name, int create, int rank, int size, int64_t slot_bytes,
                 double timeout_s) {
  const size_t num_bytes = size * sizeof(Header) + static_cast<size_t>(size) * 2 * slot_bytes;
  const int fd = shm_open(name, create ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
  if (fd < 0) return nullptr;
  // Allocated now: a full /dev/shm would otherwise kill the first writer with SIGBUS.
  if (create && posix_fallocate(fd, 0, static_cast<off_t>(num_bytes))) {
    close(fd);
    shm_unlink(name);
    return nullptr;
  }
  void* base = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (base == MAP_FAILED) {
    if (create) shm_unlink(name);
    return nullptr;
  }
  return new Group{static_cast<char*>(base), num_bytes, slot_bytes, rank, size, 0,
                   static_cast<int64_t>(timeout_s * 1e9)};
}

void group_unlink(const char* name) { shm_unlink(name); }

void group_close(void* handle) {
  Group* group = static_cast<Group*>(handle);
  Header& own = group->header(group->rank);
  own.closed.store(1);
  futex(&own.published, FUTEX_WAKE, INT32_MAX, nullptr);
  munmap(group->base, group->mapped_bytes);
  delete group;
}

int all_reduce_float32(void* handle, float* x, int64_t count) {
  return all_reduce(*static_cast<Group*>(handle), x, count);
}

int all_reduce_bfloat16(void* handle, uint16_t* x, int64_t count) {
  return all_reduce(*static_cast<Group*>(handle), x, count);
}

// out: [size, num_bytes], every rank's part.
int all_gather_bytes(void* handle, const char* part, char* out, int64_t num_bytes) {
  Group& group = *static_cast<Group*>(handle);
  for (int64_t start = 0; start < num_bytes; start += group.slot_bytes) {
    const int64_t n = std::min(group.slot_bytes, num_bytes - start);
    const int result = exchange(group, part + start, n);
    if (result) return result;
    for (int r = 0; r < group.size; r++)
      std::memcpy(out + r * num_bytes + start, group.slot(r, group.round), n);
  }
  return kOk;
}

}  // extern "C"
