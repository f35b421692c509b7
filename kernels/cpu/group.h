// Ranks of one model on one machine: sums and exchanges through memory that all of their processes map.
//
//     region   header | one Place per rank | two slots per rank, for calls of even and odd number
//
// All ranks make the same calls in the same order. In a call each rank fills its slot, announces it (`arrived`), waits for the
// others, and reads all slots in the order of ranks. One wait per call is enough: a slot is filled again two calls later, and
// its owner gets there only after all ranks have announced the call in between, after which none reads the old contents.
// Every wait ends: by the announcement, by a rank that is gone, or by the deadline.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "api.h"
#include "threads.h"

class Group {
   public:
    static int64_t bytes(int size, int64_t slot_bytes);

    Group(void* region, int rank, int size, int64_t slot_bytes, int timeout_ms, int silence_ms);
    ~Group();

    // Memory for this rank's partial sums of the next `sum`: a slot if they fit, so that they need no copy.
    float* partial(int64_t numbers);
    // out = the sum of all ranks' numbers in `partial`, added in float32 in the order of ranks and rounded once to `kind`.
    int32_t sum(Threads* threads, const float* partial, void* out, int64_t numbers, int32_t kind);
    // The same for numbers of `kind`, in place.
    int32_t all_reduce(Threads* threads, void* x, int64_t numbers, int32_t kind);
    int32_t all_gather(const void* from, int64_t rows, int64_t row_bytes, void* to);
    int32_t agree(int64_t mine, int64_t* all);
    // Declare a rank gone: every wait of every rank ends.
    void fail(int rank, WhyGone why);
    int32_t failure() const;

   private:
    enum Call : uint64_t { SUM = 1, GATHER = 2, AGREE = 3 };
    struct Header;
    struct Place;

    Place& place(int rank) const;
    char* slot(int rank, uint32_t turn) const;
    char* next_slot() const { return slot(rank_, turn_ + 1); }
    // Announce the filled slot and wait for the others. `size` of the call: ranks whose calls differ all get GROUP_DIFFERS.
    int32_t exchange(Call call, int64_t size);
    int32_t wait_for(int rank);
    void add_slots(int64_t first, int64_t end, void* out, int32_t from_kind, int32_t kind) const;
    int32_t add(Threads* threads, void* out, int64_t numbers, int32_t from_kind, int32_t kind) const;
    void beat(int interval_ms, int silence_ms);

    char* region_;
    int rank_, size_, timeout_ms_;
    int64_t slot_bytes_;
    uint32_t turn_ = 0;  // number of the last call
    std::vector<float> local_;
    std::mutex mutex_;
    std::condition_variable leaves_;
    bool is_leaving_ = false;
    std::thread beats_;
};
