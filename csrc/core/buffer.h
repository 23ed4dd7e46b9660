// Memory for panels and matrices: aligned, not initialised, kept by its thread for the next call.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bsgap {

namespace detail {

// A cache line is the least alignment: a panel's row is then one line and no vector load straddles two.
inline constexpr size_t kLine = 64, kLargePage = size_t{2} << 20;

struct Block {
  void* data = nullptr;
  size_t bytes = 0;

  size_t alignment() const { return bytes >= 2 * kLargePage ? kLargePage : kLine; }
  static Block allocate(size_t bytes) {
    Block block{nullptr, bytes};
    block.data = ::operator new(bytes, std::align_val_t{block.alignment()});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // With pages of 4 KiB the first write to 4096 x 4096 doubles would be interrupted 32768 times. Refusal of
    // the hint costs time only.
    if (block.alignment() == kLargePage) madvise(block.data, bytes, MADV_HUGEPAGE);
#endif
    return block;
  }
  void release() const { ::operator delete(data, std::align_val_t{alignment()}); }
};

// Blocks that a thread has used and may use again. Fresh memory comes from the system a page at a time at the
// first write, which took half of the time of a factorisation of side 100.
class BlockCache {
 public:
  ~BlockCache() {
    for (const Block& block : kept_)
      if (block.data) block.release();
  }
  Block take(size_t bytes) {
#if defined(BSGAP_CHECK_BUFFERS)
    // For the sanitizers: what is read before it is written is NaN, and no block is longer than was asked
    // for.
    const Block fresh = Block::allocate(bytes);
    std::memset(fresh.data, 0xFF, bytes);
    return fresh;
#endif
    for (Block& block : kept_)
      if (block.bytes >= bytes && block.bytes <= 2 * bytes) return std::exchange(block, {});
    return Block::allocate(bytes);
  }
  void give_back(const Block& block) {
    if (block.bytes < kSmallest || block.bytes > kLargest) return block.release();
    for (Block& slot : kept_)
      if (!slot.data) {
        slot = block;
        return;
      }
    kept_[next_].release();
    kept_[next_] = block;
    next_ = (next_ + 1) % kept_.size();
  }
  static BlockCache& of_this_thread() {
    thread_local BlockCache cache;
    return cache;
  }

 private:
  // 8 MiB a thread at most. Smaller blocks the allocator keeps by itself.
  static constexpr size_t kSmallest = size_t{32} << 10, kLargest = size_t{2} << 20;
  std::array<Block, 4> kept_;
  size_t next_ = 0;
};

}  // namespace detail

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    if (size > 0) block_ = detail::BlockCache::of_this_thread().take(static_cast<size_t>(size) * sizeof(T));
  }
  ~Buffer() {
    if (block_.data) detail::BlockCache::of_this_thread().give_back(block_);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return static_cast<T*>(block_.data); }
  const T* data() const { return static_cast<const T*>(block_.data); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

 private:
  detail::Block block_;
  int64_t size_ = 0;
};

}  // namespace bsgap
