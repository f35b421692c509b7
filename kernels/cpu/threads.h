// A few threads that share one piece of work at a time, taken in small parts. Knows nothing of what is computed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Threads {
   public:
    explicit Threads(int count) {
        for (int i = 1; i < count; i++) others_.emplace_back([this] { serve(); });
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

    // Call `part(i)` once for each i below num_parts, by whichever thread is free. Which one does it must change no bit.
    void share(int num_parts, const std::function<void(int)>& part) {
        if (others_.empty() || num_parts <= 1) {
            for (int i = 0; i < num_parts; i++) part(i);
            return;
        }
        part_ = &part;
        num_parts_ = num_parts;
        next_.store(0, std::memory_order_relaxed);
        busy_.store((int)others_.size(), std::memory_order_relaxed);
        turn_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> guard(mutex_);
            wake_.notify_all();
        }
        take_parts();
        for (int spin = 0; busy_.load(std::memory_order_acquire); spin++) rest(spin);
    }

   private:
    static constexpr int SPINS = 4000;  // about 40 microseconds: the pause between two ops of one step

    static void rest(int spin) {
        if (spin < SPINS) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            std::this_thread::yield();
        }
    }
    void take_parts() {
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_parts_;) (*part_)(i);
    }
    void serve() {
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
            take_parts();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> others_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> turn_{0};
    std::atomic<int> next_{0}, busy_{0}, asleep_{0};
    const std::function<void(int)>* part_ = nullptr;
    int num_parts_ = 0;
    bool ends_ = false;
};
