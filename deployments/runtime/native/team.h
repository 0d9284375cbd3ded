// A team of threads that computes one step: every member runs the same program and takes chunks of each phase.
//
// A phase ends when all its chunks are done, not when all members have arrived, so a member that the operating system
// has set aside holds the others up only for the one chunk that it may have in hand.
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace manta {

constexpr int kSpinsBetweenPhases = 600;  // about 40 us, beyond a chunk of a small step; then the core goes to others
constexpr int kSpinsBetweenSteps = 400;
constexpr std::chrono::milliseconds kYieldsFor{3};  // beyond the pause between two steps

struct alignas(64) Counter {
  std::atomic<int> value{0};
};

// Spins, then offers the core to whoever wants it, then sleeps. It sleeps late because a virtual core without work halts,
// and a busy host takes long to wake it.
inline void wait_while(const std::atomic<int>& value, int unwanted, int num_spins) {
  for (int spin = 0; spin < num_spins; ++spin) {
    if (value.load(std::memory_order_acquire) != unwanted) return;
    _mm_pause();
  }
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - start < kYieldsFor) {
    if (value.load(std::memory_order_acquire) != unwanted) return;
    sched_yield();
  }
  value.wait(unwanted, std::memory_order_acquire);
}

// One thread's way through the program of a step.
class Member {
 public:
  // `counters` holds for each phase how many chunks are done, then how many of each member's are taken.
  Member(Counter* counters, int index, int num_members)
      : index(index), num_members(num_members), counters_(counters) {}

  // Calls work(chunk) for those of 0 .. num_chunks that no other member takes, its own contiguous part first; returns
  // when all are done.
  template <class Work>
  void share(int num_chunks, const Work& work) {
    if (num_chunks <= 0) return;
    std::atomic<int>& done = counters_->value;
    for (int offset = 0; offset < num_members; ++offset) {
      const int owner = (index + offset) % num_members;
      const int start = static_cast<int>(int64_t{num_chunks} * owner / num_members);
      const int size = static_cast<int>(int64_t{num_chunks} * (owner + 1) / num_members) - start;
      std::atomic<int>& taken = counters_[1 + owner].value;
      if (taken.load(std::memory_order_relaxed) >= size) continue;
      for (int chunk; (chunk = taken.fetch_add(1, std::memory_order_relaxed)) < size;) {
        work(start + chunk);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks) done.notify_all();
      }
    }
    for (int now; (now = done.load(std::memory_order_acquire)) != num_chunks;)
      wait_while(done, now, kSpinsBetweenPhases);
    counters_ += 1 + num_members;
  }

  const int index;
  const int num_members;

 private:
  Counter* counters_;
};

class Team {
 public:
  Team(int num_threads, int max_phases)
      : num_members_(num_threads),
        num_counters_(max_phases * (num_threads + 1)),
        counters_(new Counter[num_counters_]) {
    for (int index = 1; index < num_threads; ++index) threads_.emplace_back([this, index] { serve(index); });
  }

  ~Team() {
    stopping_.store(true);
    gate_.fetch_add(2);
    gate_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Waits until nobody is inside the last program: what it uses may be changed afterwards.
  void settle() {
    while (inside_.load() != 0) std::this_thread::yield();
  }

  // Runs program(member) on the caller's thread and on every other that comes in time; settle() must come before.
  void run(std::function<void(Member&)> program) {
    program_ = std::move(program);
    for (int counter = 0; counter < num_counters_; ++counter)
      counters_[counter].value.store(0, std::memory_order_relaxed);
    gate_.fetch_add(1);  // odd: open
    gate_.notify_all();
    Member member(counters_.get(), 0, num_members_);
    program_(member);
    gate_.fetch_add(1);  // even: closed; who is inside finds all chunks taken and leaves
  }

 private:
  void serve(int index) {
    int seen = 0;
    while (!stopping_.load()) {
      wait_while(gate_, seen, kSpinsBetweenSteps);
      seen = gate_.load();
      if (seen % 2 == 0) continue;
      inside_.fetch_add(1);
      if (gate_.load() == seen && !stopping_.load()) {
        Member member(counters_.get(), index, num_members_);
        program_(member);
      }
      inside_.fetch_sub(1);
    }
  }

  const int num_members_;
  const int num_counters_;
  std::unique_ptr<Counter[]> counters_;
  std::function<void(Member&)> program_;
  std::vector<std::thread> threads_;
  std::atomic<int> gate_{0};
  std::atomic<int> inside_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace manta
