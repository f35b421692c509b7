// Thread pool that runs one job at a time, divided into small parts. Knows nothing of the computation.
//
// Each thread begins with its own stretch of parts, so that it reads contiguous memory and finds its earlier results in its
// cache. A thread that has finished takes parts of the other stretches (work stealing).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Threads {
   public:
    explicit Threads(int count) : stretches_(new Stretch[count]) {
        for (int i = 1; i < count; i++) others_.emplace_back([this, i] { serve(i); });
    }
    ~Threads() {
        {
            std::lock_guard<std::mutex> guard(mutex_);
            ends_ = true;
            turn_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& thread : others_) thread.join();
    }
    int count() const { return (int)others_.size() + 1; }

    // Call `part(i)` once for each i below num_parts, on any thread. Results must not depend on the thread.
    void share(int num_parts, const std::function<void(int)>& part) {
        if (others_.empty() || num_parts <= 1) {
            for (int i = 0; i < num_parts; i++) part(i);
            return;
        }
        part_ = &part;
        for (int t = 0; t < count(); t++) {
            stretches_[t].next.store((int)((int64_t)num_parts * t / count()), std::memory_order_relaxed);
            stretches_[t].end = (int)((int64_t)num_parts * (t + 1) / count());
        }
        busy_.store((int)others_.size(), std::memory_order_relaxed);
        turn_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> guard(mutex_);
            wake_.notify_all();
        }
        take_parts(0);
        for (int spin = 0; busy_.load(std::memory_order_acquire); spin++) rest(spin);
    }

   private:
    static constexpr int SPINS = 4000;  // about 40 microseconds, longer than the gap between two ops of a step

    static void rest(int spin) {
        if (spin < SPINS) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        } else {
            std::this_thread::yield();
        }
    }
    void take_parts(int thread) {
        for (int t = 0; t < count(); t++) {
            Stretch& stretch = stretches_[(thread + t) % count()];
            for (int i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) (*part_)(i);
        }
    }
    void serve(int thread) {
        unsigned seen = 0;
        for (;;) {
            int spin = 0;
            while (turn_.load(std::memory_order_acquire) == seen && spin < SPINS) rest(spin++);
            if (turn_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return turn_.load(std::memory_order_seq_cst) != seen; });
                asleep_.fetch_sub(1, std::memory_order_seq_cst);
            }
            seen++;
            if (ends_) return;
            take_parts(thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    struct alignas(64) Stretch {
        std::atomic<int> next{0};
        int end = 0;
    };

    std::unique_ptr<Stretch[]> stretches_;
    std::vector<std::thread> others_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> turn_{0};
    std::atomic<int> busy_{0}, asleep_{0};
    const std::function<void(int)>* part_ = nullptr;
    bool ends_ = false;
};
