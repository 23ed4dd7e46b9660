// The CPU's definition of csrc/cuda/platform.cuh: kernels run from their own source, one block after another
// or a few at a time, in one of two ways.
//
//   fibers (default)             every CUDA thread is a fiber of one OS thread, switched at barriers: fast
//   and
//                                deterministic, and blind to races
//   BSGAP_HOST_THREADS defined   every CUDA thread is an OS thread, two blocks run at a time: under
//                                ThreadSanitizer a missing barrier, within a block or between blocks of one
//                                launch, is a reported race
//
// Dynamic shared memory is allocated to its exact size and poisoned before each block. A block whose threads
// do not all pass the same number of barriers, or whose barriers never complete, ends the process with a
// message.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef BSGAP_HOST_THREADS
#include <barrier>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace bsgap::cuda {

inline constexpr int kWarp = 32;

namespace host {

[[noreturn]] inline void fail(const std::string& text) {
  std::fprintf(stderr, "cuda_host: %s\n", text.c_str());
  std::fflush(stderr);
  std::abort();
}

struct Launch {
  std::string name;
  dim3 grid;
  unsigned threads;
  size_t shared;
};

// Every launch since the process began (or since it was cleared), for tests that assert what ran.
inline std::vector<Launch>& launches() {
  static std::vector<Launch> log;
  return log;
}

// A line a launch: kernel, blocks, threads of a block.
inline void print_launches() {
  for (const Launch& l : launches())
    std::printf("%s %llu %u\n", l.name.c_str(), 1ull * l.grid.x * l.grid.y * l.grid.z, l.threads);
}

struct Block;

struct Thread {
  dim3 thread_index, block_index, block_size, grid_size;
  Block* block = nullptr;
  int64_t block_barriers = 0;
  unsigned products = 0;  // of dmma_8x8x4 so far
#ifndef BSGAP_HOST_THREADS
  ucontext_t context;  // where it starts
  jmp_buf resumes;     // where it goes on: unlike swapcontext, a jump makes no system call
  bool started = false, done = false;
  int64_t waits_for = 0;             // generation of the barrier it stands at
  const int64_t* barrier = nullptr;  // that barrier's generation now
#endif
};

inline Thread*& current() {
  static thread_local Thread* thread = nullptr;
  return thread;
}

#ifdef BSGAP_HOST_THREADS
using Barrier = std::barrier<>;
#else
struct Barrier {
  explicit Barrier(int64_t count) : expected(count) {}
  int64_t expected, arrived = 0, generation = 0;
};
#endif

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  Barrier barrier;
  alignas(16) unsigned char slot[kWarp][16];
  double a[2][kWarp], b[2][kWarp];
};

// Signalling NaN to whoever reads what nobody wrote: arithmetic on it raises FE_INVALID.
inline void poison(void* memory, size_t bytes) {
  constexpr uint64_t kSignalling = 0xFFF7FFFFFFFFFFFF;
  for (size_t at = 0; at < bytes; at += sizeof(kSignalling))
    std::memcpy(static_cast<char*>(memory) + at, &kSignalling, std::min(sizeof(kSignalling), bytes - at));
}

struct Block {
  Block(unsigned threads, size_t shared_bytes)
      : barrier(threads), shared_size(shared_bytes), shared(nullptr, &std::free) {
    for (unsigned first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<Warp>(std::min<unsigned>(kWarp, threads - first)));
    if (shared_bytes > 0) {
      shared.reset(static_cast<unsigned char*>(std::malloc(shared_bytes)));
      poison(shared.get(), shared_bytes);
    }
  }
  Barrier barrier;
  size_t shared_size;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared;
  std::vector<std::unique_ptr<Warp>> warps;
#ifndef BSGAP_HOST_THREADS
  ucontext_t scheduler;
  jmp_buf waits_for_fiber;
#endif
};

inline int lane() { return static_cast<int>(current()->thread_index.x % kWarp); }
inline Warp& warp() { return *current()->block->warps[current()->thread_index.x / kWarp]; }

#ifdef BSGAP_HOST_THREADS

inline void wait(Barrier& barrier) { barrier.arrive_and_wait(); }

inline void run_blocks(const std::vector<dim3>& indices, dim3 grid, unsigned threads, size_t shared,
                       const std::function<void()>& body) {
  constexpr size_t kBlocksAtATime = 2;
  for (size_t first = 0; first < indices.size(); first += kBlocksAtATime) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Thread>> states;
    std::vector<std::thread> workers;
    for (size_t b = first; b < std::min(indices.size(), first + kBlocksAtATime); ++b) {
      blocks.push_back(std::make_unique<Block>(threads, shared));
      for (unsigned t = 0; t < threads; ++t) {
        states.push_back(std::make_unique<Thread>());
        *states.back() = Thread{dim3(t), indices[b], dim3(threads), grid, blocks.back().get(), 0};
      }
    }
    for (const auto& state : states)
      workers.emplace_back([&body, thread = state.get()] {
        current() = thread;
        body();
      });
    for (std::thread& worker : workers) worker.join();
    for (size_t t = 1; t < states.size(); ++t)
      if (t % threads != 0 && states[t]->block_barriers != states[t - 1]->block_barriers)
        fail("threads of a block passed different numbers of barriers");
  }
}

#else

inline void wait(Barrier& barrier) {
  Thread* thread = current();
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  thread->barrier = &barrier.generation;
  thread->waits_for = barrier.generation + 1;
  if (_setjmp(thread->resumes) == 0) _longjmp(thread->block->waits_for_fiber, 1);
}

inline const std::function<void()>*& fiber_body() {
  static thread_local const std::function<void()>* body = nullptr;
  return body;
}

inline void fiber_main() {
  (*fiber_body())();
  current()->done = true;
  _longjmp(current()->block->waits_for_fiber, 1);
}

// Runs a fiber until its next barrier or its end.
[[gnu::noinline]] inline void resume(Thread& thread) {
  Block& block = *thread.block;
  if (_setjmp(block.waits_for_fiber) != 0) return;
  if (thread.started) _longjmp(thread.resumes, 1);
  thread.started = true;
  swapcontext(&block.scheduler, &thread.context);
}

inline constexpr size_t kStackBytes = 256 * 1024;

// Stacks are kept between launches: a kernel needs little, sanitizers and std::function somewhat more.
inline unsigned char* fiber_stack(unsigned thread) {
  static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new unsigned char[kStackBytes]);
  return stacks[thread].get();
}

// Apart from its caller, whose variables getcontext must not be able to clobber.
inline void start_fiber(ucontext_t& context, unsigned char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
}

inline void run_blocks(const std::vector<dim3>& indices, dim3 grid, unsigned threads, size_t shared,
                       const std::function<void()>& body) {
  for (const dim3 index : indices) {
    Block block(threads, shared);
    std::vector<Thread> states(threads);
    fiber_body() = &body;
    for (unsigned t = 0; t < threads; ++t) {
      Thread& state = states[t];
      state.thread_index = dim3(t), state.block_index = index, state.block_size = dim3(threads);
      state.grid_size = grid, state.block = &block;
      start_fiber(state.context, fiber_stack(t));
    }
    for (unsigned left = threads; left > 0;) {
      bool moved = false;
      for (Thread& state : states) {
        if (state.done || (state.barrier && *state.barrier < state.waits_for)) continue;
        moved = true;
        state.barrier = nullptr;
        current() = &state;
        resume(state);
        left -= state.done;
      }
      if (!moved) fail("a barrier that some threads of the block never reach");
    }
    for (unsigned t = 1; t < threads; ++t)
      if (states[t].block_barriers != states[t - 1].block_barriers)
        fail("threads of a block passed different numbers of barriers");
  }
  current() = nullptr;
}

#endif

}  // namespace host

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(host::current()->block->shared.get());
}

inline void block_sync() {
  ++host::current()->block_barriers;
  host::wait(host::current()->block->barrier);
}
inline void warp_sync() { host::wait(host::warp().barrier); }

template <class T>
T warp_shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 16);
  host::Warp& warp = host::warp();
  std::memcpy(warp.slot[host::lane()], &value, sizeof(T));
  warp_sync();
  std::memcpy(&value, warp.slot[lane], sizeof(T));
  warp_sync();
  return value;
}
template <class T>
T warp_shuffle_xor(T value, int mask) {
  return warp_shuffle(value, host::lane() ^ mask);
}
inline unsigned warp_ballot(bool predicate) {
  host::Warp& warp = host::warp();
  warp.slot[host::lane()][0] = predicate;
  warp_sync();
  unsigned bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= static_cast<unsigned>(warp.slot[l][0]) << l;
  warp_sync();
  return bits;
}

inline void dmma_8x8x4(double (&c)[2], double a, double b) {
  host::Warp& warp = host::warp();
  const int lane = host::lane(), row = lane / 4, column = 2 * (lane % 4);
  // Two buffers in turn: a lane is back at one only after the barrier between, which no lane passes before
  // all have read.
  const int half = static_cast<int>(host::current()->products++ % 2);
  warp.a[half][lane] = a;
  warp.b[half][lane] = b;
  warp_sync();
  for (int j = 0; j < 2; ++j)
    for (int k = 0; k < 4; ++k)
      c[j] = std::fma(warp.a[half][row * 4 + k], warp.b[half][(column + j) * 4 + k], c[j]);
}

inline bool last_to_arrive(unsigned* counter, unsigned total, unsigned* flag) {
  block_sync();
  if (host::current()->thread_index.x == 0)
    *flag = std::atomic_ref<unsigned>(*counter).fetch_add(1, std::memory_order_acq_rel) == total - 1;
  block_sync();
  return *flag != 0;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
            cudaStream_t, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0)
    host::fail("a block of whole warps, at most 1024");
  if (shared > kMaxShared) host::fail("more shared memory than the smallest supported GPU has");
  if (grid.y > 65535 || grid.z > 65535) host::fail("grid.y and grid.z end at 65535");
  host::launches().push_back({name, grid, threads, shared});
  std::vector<dim3> indices;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) indices.emplace_back(x, y, z);
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  host::run_blocks(indices, grid, threads, shared, body);
}

}  // namespace bsgap::cuda

#define threadIdx (::bsgap::cuda::host::current()->thread_index)
#define blockIdx (::bsgap::cuda::host::current()->block_index)
#define blockDim (::bsgap::cuda::host::current()->block_size)
#define gridDim (::bsgap::cuda::host::current()->grid_size)
