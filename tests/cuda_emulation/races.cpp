// A race detector for the emulated kernels, in place of the runtime of -fsanitize=thread: the compiler puts a call of
// __tsan_read… or __tsan_write… before each access to memory, and this file answers those calls.
//
// Two accesses to a byte race where one of them writes, they come from different threads, and neither a barrier of the
// block nor a __syncwarp of a common warp lies between them. Nothing orders the blocks of one launch. That does not
// depend on the order in which the emulation happens to run the threads: one run finds every race among the accesses it
// makes. A race ends the launch with an error.
//
// Shared memory holds garbage when a block begins. Here a byte that nobody in the block has written turns into 0xff
// when it is read: NaN in every floating type, so that a kernel which needs zeros there does not get them.
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulation.h"

extern "C" __attribute__((visibility("hidden"))) char emulated_shared_begin, emulated_shared_end;  // shared_memory.ld

namespace {

using emulation::kWarp;
using emulation::Place;

struct Byte {
  Place written, read, also_read;  // the last write, and the last reads by two different threads
};

constexpr uintptr_t kPage = 4096;
constexpr size_t kMostPages = 2000;
std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;

Byte& byte_at(uintptr_t address) {
  static uintptr_t last_number = 0;
  static Byte* last = nullptr;
  if (last == nullptr || address / kPage != last_number) {
    if (pages.size() > kMostPages) pages.clear();  // mostly of earlier launches, which cannot race with this one
    std::unique_ptr<Byte[]>& page = pages[address / kPage];
    if (!page) page.reset(new Byte[kPage]);
    last_number = address / kPage;
    last = page.get();
  }
  return last[address % kPage];
}

bool is_shared(uintptr_t address) {
  return address >= reinterpret_cast<uintptr_t>(&emulated_shared_begin) &&
         address < reinterpret_cast<uintptr_t>(&emulated_shared_end);
}

bool same_thread(const Place& a, const Place& b) { return a.block == b.block && a.thread == b.thread; }

bool ordered(const Place& before, const Place& now, bool shared) {
  if (before.launch != now.launch || same_thread(before, now)) return true;
  if (before.block != now.block) return shared;  // every block has shared memory of its own
  if (before.block_phase != now.block_phase) return true;
  return before.thread / kWarp == now.thread / kWarp && before.warp_phase != now.warp_phase;
}

[[noreturn]] void report(const char* what, const Place& before, const Place& now, bool shared) {
  emulation::fail(std::string("race in ") + (shared ? "shared" : "global") + " memory: " + what + " after thread " +
                  std::to_string(before.thread) + " of block " + std::to_string(before.block) +
                  " without a barrier between them");
}

void access(void* pointer, size_t size, bool write) {
  if (!emulation::in_kernel()) return;
  const auto first = reinterpret_cast<uintptr_t>(pointer);
  // what lies near this frame is on the thread's own stack
  if (first + 65536 - reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) < 2 * 65536) return;
const Place now = emulation::place();
  const bool shared = is_shared(first);
  for (uintptr_t address = first; address < first + size; ++address) {
    Byte& byte = byte_at(address);
    if (!ordered(byte.written, now, shared)) {
      report(write ? "write after write" : "read after write", byte.written, now, shared);
    }
    if (write) {
      for (const Place& read : {byte.read, byte.also_read}) {
        if (!ordered(read, now, shared)) report("write after read", read, now, shared);
      }
      byte.written = now;
      continue;
    }
    const bool untouched = byte.written.launch != now.launch || byte.written.block != now.block;
    if (shared && untouched) std::memset(reinterpret_cast<void*>(address), 0xff, 1);
    if (!same_thread(byte.read, now)) byte.also_read = byte.read;
    byte.read = now;
  }
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t size) { access(address, size, false); }
void __tsan_write_range(void* address, size_t size) { access(address, size, true); }

#define EMULATION_ACCESS(size)                                                      \
  void __tsan_read##size(void* address) { access(address, size, false); }           \
  void __tsan_write##size(void* address) { access(address, size, true); }           \
  void __tsan_unaligned_read##size(void* address) { access(address, size, false); } \
  void __tsan_unaligned_write##size(void* address) { access(address, size, true); }
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)

// Host code counts references with atomics, which the compiler hands over as well.
#define EMULATION_ATOMIC(bits)                                                                           \
  using Value##bits = uint##bits##_t;                                                                    \
  Value##bits __tsan_atomic##bits##_load(const volatile Value##bits* a, int) {                           \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                      \
  void __tsan_atomic##bits##_store(volatile Value##bits* a, Value##bits v, int) {                        \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                      \
  Value##bits __tsan_atomic##bits##_fetch_add(volatile Value##bits* a, Value##bits v, int) {             \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                      \
  Value##bits __tsan_atomic##bits##_fetch_sub(volatile Value##bits* a, Value##bits v, int) {             \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                   \
  }
EMULATION_ATOMIC(8)
EMULATION_ATOMIC(32)
EMULATION_ATOMIC(64)
}
