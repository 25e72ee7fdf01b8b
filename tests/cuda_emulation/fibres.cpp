// Fibres in the order in which a GPU could have run them: a warp at a time up to the block's next barrier, and within it
// a lane at a time up to the warp's next meeting. A meeting to which only a part of the threads comes is an error.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_ASSEMBLY
#else
#include <ucontext.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
enum class Wait { nothing, warp, block, returned };

// ---- switching between stacks --------------------------------------------------------------------------------

#if defined(EMULATION_ASSEMBLY)
// swapcontext asks the kernel for the signal mask each time; this saves what a function call must keep, and the stack.
extern "C" void emulation_switch_stack(void** save, void* to);
asm(R"(
.text
.local emulation_switch_stack
.type emulation_switch_stack, @function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack, . - emulation_switch_stack
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    constexpr int kSavedRegisters = 6;
    auto* top = reinterpret_cast<uint64_t*>(stack + kStackBytes) - 1;  // off by 8 from 16, as a call leaves it
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = 0;
    stack_pointer = top;
  }
  void switch_to(Context& other) { emulation_switch_stack(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

// A stack with a page below it that must not be touched, so that running over its end does not go unnoticed.
char* new_stack() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) std::abort();
  return static_cast<char*>(memory) + page;
}

// ---- one block -----------------------------------------------------------------------------------------------

struct Fibre {
  Context context;
  Wait wait = Wait::nothing;
  uint64_t exchange[2] = {0, 0};  // two, so that a lane may come with its next value before all have read its last
  unsigned exchanges = 0;
};

std::vector<Fibre> fibres;
std::vector<char*> stacks;  // a thread's own, by its number
std::vector<uint32_t> warp_phases;
Context scheduler;
const std::function<void()>* body = nullptr;
uint32_t launches = 0, block_phase = 0;
int current = -1;
std::string failure;

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer must be told which stack is in use.
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

void resume(Fibre& fibre) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stacks[current], kStackBytes);
  scheduler.switch_to(fibre.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}
void leave(Fibre& fibre) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_size);
  fibre.context.switch_to(scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_size);
}
void entered() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size); }
void forget_old_frames(char* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
void resume(Fibre& fibre) { scheduler.switch_to(fibre.context); }
void leave(Fibre& fibre) { fibre.context.switch_to(scheduler); }
void entered() {}
void forget_old_frames(char*) {}
#endif

void wait_for(Wait what) {
  Fibre& self = fibres[current];
  self.wait = what;
  leave(self);
}

void fibre_main() {
  entered();
  (*body)();
  wait_for(Wait::returned);
}

// Every thread of the warp in turn, up to the block's next barrier or the kernel's end.
void run_warp(int warp) {
  Fibre* const lanes = &fibres[warp * kWarp];
  for (;;) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane].wait != Wait::nothing) continue;
      current = warp * kWarp + lane;
      threadIdx = dim3(static_cast<unsigned>(current));
      resume(lanes[lane]);
      if (!failure.empty()) return;
    }
    int meeting = 0;
    for (int lane = 0; lane < kWarp; ++lane) meeting += lanes[lane].wait == Wait::warp;
    if (meeting == 0) return;
    if (meeting != kWarp) {
      failure = "only a part of a warp comes to a shuffle, a vote or __syncwarp";
      return;
    }
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane].wait = Wait::nothing;
  }
}

void run_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    fibres[t].wait = Wait::nothing;
    fibres[t].exchanges = 0;
    fibres[t].context.prepare(stacks[t], fibre_main);
  }
  warp_phases.assign(threads / kWarp, 0);
  for (block_phase = 0;; ++block_phase) {
    for (int warp = 0; warp < threads / kWarp && failure.empty(); ++warp) run_warp(warp);
    if (!failure.empty()) return;
    int returned = 0, at_barrier = 0;
    for (int t = 0; t < threads; ++t) {
      returned += fibres[t].wait == Wait::returned;
      at_barrier += fibres[t].wait == Wait::block;
    }
    if (returned == threads) return;
    if (at_barrier != threads) {
      failure = "only a part of a block comes to __syncthreads";
      return;
    }
    for (int t = 0; t < threads; ++t) fibres[t].wait = Wait::nothing;
  }
}

}  // namespace

// ---- what cuda_runtime.h uses --------------------------------------------------------------------------------

std::string run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  failure.clear();
  ++launches;
  if (fibres.size() < threads) fibres.resize(threads);
  while (stacks.size() < threads) stacks.push_back(new_stack());
  for (unsigned t = 0; t < threads; ++t) forget_old_frames(stacks[t]);
  for (unsigned block = 0; block < blocks && failure.empty(); ++block) {
    blockIdx = dim3(block);
    run_block(static_cast<int>(threads));
  }
  if (!failure.empty()) {
    failure += " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ")";
  }
  current = -1;
  return failure;
}

bool in_kernel() { return current >= 0; }

Place place() {
  return {launches, blockIdx.x, static_cast<uint32_t>(current), block_phase, warp_phases[current / kWarp]};
}

void sync_block() { wait_for(Wait::block); }

void sync_warp() {
  const int warp = current / kWarp, lane = current % kWarp;
  wait_for(Wait::warp);
  if (lane == 0) ++warp_phases[warp];  // the first to go on
}

uint64_t exchange(uint64_t value, int source) {
  const int me = current;
  const unsigned buffer = fibres[me].exchanges++ % 2;
  fibres[me].exchange[buffer] = value;
  wait_for(Wait::warp);
  return fibres[me / kWarp * kWarp + source].exchange[buffer];
}

unsigned ballot(bool condition) {
  const int me = current;
  const unsigned buffer = fibres[me].exchanges % 2;
  exchange(condition, 0);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    bits |= static_cast<unsigned>(fibres[me / kWarp * kWarp + lane].exchange[buffer]) << lane;
  }
  return bits;
}

void fail(const std::string& message) {
  failure = message;
  leave(fibres[current]);
  std::abort();  // nobody resumes a thread of a launch that failed
}

}  // namespace emulation
