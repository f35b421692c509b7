// Sums and exchanges between ranks; layout and protocol are drawn in group.h. Waits spin shortly, then sleep in the kernel.
#include "group.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "api.h"
#include "simd.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace {

constexpr int SPINS = 4000;               // as in threads.h: about 40 microseconds
constexpr int SLICE_MS = 10;              // longest sleep between two looks at the header
constexpr int64_t SHARED_NUMBERS = 8192;  // per thread; fewer are added faster by one
constexpr int64_t PAGE = 4096;
constexpr int PATIENCE = 10;  // times silence_ms, for a process that is neither dead nor stopped

using Clock = std::chrono::steady_clock;

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
    const timespec slice{0, SLICE_MS * 1000000};
    syscall(SYS_futex, &word, FUTEX_WAIT, value, &slice, nullptr, 0);
#else
    if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}
void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
#endif
}
void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}
// True if a process is dead or stopped. Without its beats alone this is not known: on a busy machine its threads may wait long.
bool is_still(int32_t process) {
#if defined(__linux__)
    char line[512];
    const auto stat = [&](const std::string& which) {
        std::FILE* file = std::fopen(("/proc/" + which + "/stat").c_str(), "r");
        const size_t size = file ? std::fread(line, 1, sizeof line - 1, file) : 0;
        if (file) std::fclose(file);
        line[size] = 0;
        return size > 0;
    };
    if (!stat(std::to_string(process))) return stat("self");  // dead, if others are to be seen there
    const char* name_end = std::strrchr(line, ')');
    return name_end && name_end[1] && std::strchr("TtZX", name_end[2]);
#else
    return true;
#endif
}
int32_t own_process() {
#if defined(__linux__)
    return getpid();
#else
    return 0;
#endif
}
int64_t rounded_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }
int number_bytes(int kind) { return kind == BFLOAT16 ? 2 : 4; }

}  // namespace

struct alignas(64) Group::Header {
    std::atomic<int32_t> gone;  // 0, or why * 256 + 1 + the rank that is gone
};

struct alignas(64) Group::Place {
    std::atomic<uint32_t> arrived;  // number of the last announced call
    std::atomic<uint64_t> call[2];  // kind and size of the last call of even and of odd number
    alignas(64) std::atomic<uint32_t> asleep;  // ranks that sleep until `arrived` changes
    alignas(64) std::atomic<uint32_t> beats;   // 0: not joined yet
    std::atomic<uint32_t> has_left;
    std::atomic<int32_t> process;
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

int64_t Group::bytes(int size, int64_t slot_bytes) {
    return rounded_up(sizeof(Header) + size * sizeof(Place), PAGE) + 2 * size * rounded_up(slot_bytes, PAGE);
}

Group::Group(void* region, int rank, int size, int64_t slot_bytes, int timeout_ms, int silence_ms)
    : region_((char*)region), rank_(rank), size_(size), timeout_ms_(timeout_ms), slot_bytes_(rounded_up(slot_bytes, PAGE)) {
    place(rank_).process.store(own_process());
    place(rank_).beats.store(1);
    const int interval_ms = std::max(1, silence_ms / 16);
    beats_ = std::thread([=] { beat(interval_ms, silence_ms); });
}

Group::~Group() {
    {
        std::lock_guard<std::mutex> guard(mutex_);
        is_leaving_ = true;
    }
    leaves_.notify_all();
    beats_.join();
    place(rank_).has_left.store(1);
    wake(place(rank_).arrived);
}

Group::Place& Group::place(int rank) const { return ((Place*)(region_ + sizeof(Header)))[rank]; }

char* Group::slot(int rank, uint32_t turn) const {
    const int64_t first = rounded_up(sizeof(Header) + size_ * sizeof(Place), PAGE);
    return region_ + first + (2 * rank + turn % 2) * slot_bytes_;
}

void Group::fail(int rank, WhyGone why) {
    int32_t none = 0;
    ((Header*)region_)->gone.compare_exchange_strong(none, why * 256 + 1 + rank);
    for (int r = 0; r < size_; r++) wake(place(r).arrived);
}

int32_t Group::failure() const { return ((Header*)region_)->gone.load(); }

// ---------------------------------------------------------------- waiting

// Count this rank's beats, and notice a rank whose beats stop: its process is dead or frozen. Time is counted in this thread's own
// wake-ups, so that a machine that stops for a while, with all of its processes, loses no rank.
void Group::beat(int interval_ms, int silence_ms) {
    std::vector<uint32_t> seen(size_, 0);
    std::vector<int> missed(size_, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    while (!leaves_.wait_for(lock, std::chrono::milliseconds(interval_ms), [this] { return is_leaving_; })) {
        std::atomic<uint32_t>& mine = place(rank_).beats;
        mine.store(std::max(1u, mine.load() + 1));
        for (int r = 0; r < size_; r++) {
            const uint32_t now = place(r).beats.load();
            missed[r] = now == seen[r] ? missed[r] + 1 : 0;
            seen[r] = now;
            const int silent_ms = missed[r] * interval_ms;
            if (r == rank_ || !now || place(r).has_left.load() || silent_ms < silence_ms) continue;
            if (silent_ms >= PATIENCE * silence_ms || is_still(place(r).process.load())) fail(r, SILENT);
        }
    }
}

int32_t Group::wait_for(int rank) {
    Place& other = place(rank);
    const auto is_there = [&](uint32_t arrived) { return (int32_t)(arrived - turn_) >= 0; };
    for (int spin = 0; spin < SPINS; spin++) {
        if (is_there(other.arrived.load(std::memory_order_acquire))) return 0;
        relax();
    }
    const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms_);
    for (;;) {
        other.asleep.fetch_add(1);
        const uint32_t arrived = other.arrived.load();
        const bool has_left = other.has_left.load();
        if (!is_there(arrived) && !has_left && !failure()) sleep_while(other.arrived, arrived);
        other.asleep.fetch_sub(1);
        if (is_there(other.arrived.load())) return 0;
        if (has_left || Clock::now() > deadline) fail(rank, has_left ? LEFT : LATE);
        if (const int32_t gone = failure()) return gone;
    }
}

int32_t Group::exchange(Call call, int64_t size) {
    if (const int32_t gone = failure()) return gone;
    const uint64_t mine = (uint64_t)call << 56 | (uint64_t)size;
    const uint32_t turn = ++turn_;
    Place& own = place(rank_);
    own.call[turn % 2].store(mine, std::memory_order_relaxed);
    own.arrived.store(turn);
    if (own.asleep.load()) wake(own.arrived);
    for (int r = 0; r < size_; r++)
        if (const int32_t gone = r == rank_ ? 0 : wait_for(r)) return gone;
    for (int r = 0; r < size_; r++)
        if (place(r).call[turn % 2].load(std::memory_order_relaxed) != mine) return GROUP_DIFFERS;
    return 0;
}

// ---------------------------------------------------------------- sums

float* Group::partial(int64_t numbers) {
    if (numbers * 4 <= slot_bytes_) return (float*)next_slot();
    if ((int64_t)local_.size() < numbers) local_.resize(numbers);
    return local_.data();
}

int32_t Group::sum(Threads* threads, const float* partial, void* out, int64_t numbers, int32_t kind) {
    if ((const char*)partial == next_slot()) {
        const int32_t failure = exchange(SUM, numbers);
        return failure ? failure : add(threads, out, numbers, FLOAT32, kind);
    }
    const int64_t piece = slot_bytes_ / 4;
    for (int64_t first = 0; first < numbers; first += piece) {
        const int64_t count = std::min(piece, numbers - first);
        std::memcpy(next_slot(), partial + first, count * 4);
        if (const int32_t failure = exchange(SUM, count)) return failure;
        add(threads, (char*)out + first * number_bytes(kind), count, FLOAT32, kind);
    }
    return 0;
}

int32_t Group::all_reduce(Threads* threads, void* x, int64_t numbers, int32_t kind) {
    const int width = number_bytes(kind);
    const int64_t piece = slot_bytes_ / width;
    for (int64_t first = 0; first < numbers; first += piece) {
        const int64_t count = std::min(piece, numbers - first);
        char* at = (char*)x + first * width;
        std::memcpy(next_slot(), at, count * width);
        if (const int32_t failure = exchange(SUM, count)) return failure;
        add(threads, at, count, kind, kind);
    }
    return 0;
}

// out = sum of the slots of the present call. Each rank adds all of them: for a few ranks this costs less than adding a share of
// the columns and exchanging the sums in a second call.
int32_t Group::add(Threads* threads, void* out, int64_t numbers, int32_t from_kind, int32_t kind) const {
    const int parts = threads ? (int)std::min<int64_t>(threads->count(), numbers / SHARED_NUMBERS) : 1;
    if (parts <= 1) {
        add_slots(0, numbers, out, from_kind, kind);
        return 0;
    }
    const int64_t share = rounded_up((numbers + parts - 1) / parts, simd::LANES);
    threads->share(parts, [&](int part) {
        add_slots(std::min(numbers, part * share), std::min(numbers, (part + 1) * share), out, from_kind, kind);
    });
    return 0;
}

void Group::add_slots(int64_t first, int64_t end, void* out, int32_t from_kind, int32_t kind) const {
    using namespace simd;
    const auto load_at = [&](int rank, int64_t i) {
        const char* from = slot(rank, turn_);
        return from_kind == FLOAT32 ? load<F32>((const float*)from + i) : load_bf16((const uint16_t*)from + i);
    };
    int64_t i = first;
    for (; i + LANES <= end; i += LANES) {
        F32 sum = load_at(0, i);
        for (int r = 1; r < size_; r++) sum = sum + load_at(r, i);
        if (kind == FLOAT32)
            store((float*)out + i, sum);
        else
            store_bf16((uint16_t*)out + i, sum);
    }
    for (; i < end; i++) {
        float sum = 0;
        for (int r = 0; r < size_; r++) {
            const char* from = slot(r, turn_);
            const float x = from_kind == FLOAT32 ? ((const float*)from)[i] : to_float(((const uint16_t*)from)[i]);
            sum = r ? sum + x : x;
        }
        if (kind == FLOAT32)
            ((float*)out)[i] = sum;
        else
            ((uint16_t*)out)[i] = rounded(splat(sum))[0];
    }
}

// ---------------------------------------------------------------- exchanges

int32_t Group::all_gather(const void* from, int64_t rows, int64_t row_bytes, void* to) {
    if (row_bytes > slot_bytes_) return GROUP_DIFFERS;  // the caller made the slots too small
    const int64_t piece = row_bytes ? slot_bytes_ / row_bytes : rows;
    for (int64_t first = 0; first < rows; first += piece) {
        const int64_t count = std::min(piece, rows - first);
        std::memcpy(next_slot(), (const char*)from + first * row_bytes, count * row_bytes);
        if (const int32_t failure = exchange(GATHER, count * row_bytes)) return failure;
        for (int r = 0; r < size_ && to; r++)
            for (int64_t i = 0; i < count; i++)
                std::memcpy((char*)to + ((first + i) * size_ + r) * row_bytes, slot(r, turn_) + i * row_bytes, row_bytes);
    }
    return 0;
}

int32_t Group::agree(int64_t mine, int64_t* all) {
    std::memcpy(next_slot(), &mine, sizeof mine);
    if (const int32_t failure = exchange(AGREE, sizeof mine)) return failure;
    for (int r = 0; r < size_; r++) std::memcpy(all + r, slot(r, turn_), sizeof mine);
    return 0;
}

// ---------------------------------------------------------------- for Python

extern "C" int64_t twostroke_group_bytes(int32_t size, int64_t slot_bytes) { return Group::bytes(size, slot_bytes); }
extern "C" Group* twostroke_join_group(void* region, int32_t rank, int32_t size, int64_t slot_bytes, int32_t timeout_ms,
                                       int32_t silence_ms) {
    return new Group(region, rank, size, slot_bytes, timeout_ms, silence_ms);
}
extern "C" void twostroke_leave_group(Group* group) { delete group; }
extern "C" void twostroke_fail_group(Group* group, int32_t rank) { group->fail(rank, DECLARED); }
extern "C" int32_t twostroke_group_failure(Group* group) { return group->failure(); }
extern "C" int32_t twostroke_all_reduce(Group* group, Threads* threads, void* x, int64_t numbers, int32_t kind) {
    return group->all_reduce(threads, x, numbers, kind);
}
extern "C" int32_t twostroke_all_gather(Group* group, const void* from, int64_t rows, int64_t row_bytes, void* to) {
    return group->all_gather(from, rows, row_bytes, to);
}
extern "C" int32_t twostroke_agree(Group* group, int64_t mine, int64_t* all) { return group->agree(mine, all); }
