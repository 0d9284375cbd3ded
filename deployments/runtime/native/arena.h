// Memory straight from the system: zeroed when first touched, in 2 MB pages where the system has them.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include <new>
#include <utility>

namespace manta {

// A block of zeroed memory, aligned to a page.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) { resize(size); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  // Grows to `size` bytes, all zero; a buffer that is large enough stays as it is.
  void resize(size_t size) {
    if (size <= size_) return;
    const bool huge = size >= kHugePage / 4;
    const size_t wanted = huge ? (size + kHugePage - 1) / kHugePage * kHugePage : size;
    char* made = map(huge ? wanted + kHugePage : wanted);
    if (huge) {  // keep the part that begins at a huge page
      const size_t before = -reinterpret_cast<uintptr_t>(made) % kHugePage;
      if (before > 0) munmap(made, before);
      if (before < kHugePage) munmap(made + before + wanted, kHugePage - before);
      made += before;
      madvise(made, wanted, MADV_HUGEPAGE);
    }
    if (data_ != nullptr) munmap(data_, size_);
    data_ = made;
    size_ = wanted;
  }

  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static char* map(size_t size) {
    void* made = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(made);
  }

  static constexpr size_t kHugePage = size_t{2} << 20;
  char* data_ = nullptr;
  size_t size_ = 0;
};

// One buffer, handed out from front to back; the order of taking is the order in memory.
class Arena {
 public:
  static size_t rounded(size_t size) { return (size + kUnit - 1) / kUnit * kUnit; }

  // The last page is a margin: prefetching runs ahead of what is read.
  explicit Arena(size_t size) : buffer_(size + kMargin) {}

  char* take(size_t size) {
    char* taken = buffer_.data() + used_;
    used_ += rounded(size);
    if (used_ + kMargin > buffer_.size()) throw std::bad_alloc();
    return taken;
  }

  size_t used() const { return used_; }

 private:
  static constexpr size_t kUnit = 1024;
  static constexpr size_t kMargin = 16384;
  Buffer buffer_;
  size_t used_ = 0;
};

}  // namespace manta
