// Copies matrices [columns, inner] into the panels that linear.cpp and linear/int8.cpp read.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "api.h"
#include "coded.h"
#include "int4.h"
#include "linear.h"

using namespace linear;

namespace {

// The most frequent exponents of one bfloat16 panel, and their codes.
class Exponents {
   public:
    Exponents(const uint16_t* from, int columns, int inner) {
        std::array<int32_t, 256> often{};
        for (int64_t i = 0; i < (int64_t)columns * inner; i++) often[from[i] >> 7 & 0xFF]++;
        often[0] += (LANES - columns) * inner;  // missing columns are zeros
        std::array<uint8_t, 256> order;
        for (int i = 0; i < 256; i++) order[i] = (uint8_t)i;
        const auto before = [&](uint8_t a, uint8_t b) { return often[a] != often[b] ? often[a] > often[b] : a < b; };
        std::partial_sort(order.begin(), order.begin() + coded::EXPONENTS, order.end(), before);
        code_of_.fill(NONE);
        num_odd_ = LANES * inner;
        for (int code = 0; code < coded::EXPONENTS; code++) {
            of_[code] = order[code], code_of_[order[code]] = (uint8_t)code;
            num_odd_ -= often[order[code]];
        }
    }
    static constexpr uint8_t NONE = 0xFF;
    int num_odd() const { return num_odd_; }
    uint8_t code(uint16_t bits) const { return code_of_[bits >> 7 & 0xFF]; }
    const uint8_t* all() const { return of_.data(); }

   private:
    std::array<uint8_t, coded::EXPONENTS> of_;
    std::array<uint8_t, 256> code_of_;
    int num_odd_;
};

void pack_coded(const uint16_t* from, int columns, int inner, int64_t panel_bytes, char* to) {
    const Exponents exponents(from, columns, inner);
    std::memset(to, 0, panel_bytes);
    coded::Header* header = (coded::Header*)to;
    std::memcpy(header->exponents, exponents.all(), coded::EXPONENTS);
    coded::Odd* odd = (coded::Odd*)header->odd();
    for (int column = 0; column < LANES; column++)
        for (int k = 0; k < inner; k++) {
            const uint16_t bits = column < columns ? from[(int64_t)column * inner + k] : 0;
            const int step = k / 2, number = 2 * column + k % 2, in_group = step % coded::STEPS;
            const int i = coded::byte_of(step, number);
            uint8_t* group = (uint8_t*)to + panel_bytes - coded::groups_bytes(inner) + step / coded::STEPS * coded::GROUP_BYTES;
            const uint8_t code = exponents.code(bits);
            if (code == Exponents::NONE) {
                odd[header->num_odd++] = {(uint32_t)(step * coded::STEP_NUMBERS + number), bits, 0};
                continue;
            }
            group[in_group / 2 * coded::LINE + i] = (uint8_t)((bits >> 8 & 0x80) | (bits & 0x7F));
            group[2 * coded::LINE + i] |= in_group < 2 ? code : code << 4;
        }
    std::sort(odd, odd + header->num_odd, [](const coded::Odd& a, const coded::Odd& b) { return a.place < b.place; });
}

int number_bytes(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

// Pack a panel of another kind, `neighbours` in k adjacent; missing columns and neighbours are zeros.
void pack_plain(const char* from, int size, int columns, int inner, int neighbours, char* out) {
    for (int k = 0; k < inner; k += neighbours)
        for (int column = 0; column < LANES; column++)
            for (int at = k; at < k + neighbours; at++, out += size)
                if (column < columns && at < inner)
                    std::memcpy(out, from + ((int64_t)column * inner + at) * size, size);
                else
                    std::memset(out, 0, size);
}

// Missing columns have scales of zero and numbers of CENTRE.
void pack_int4(const Int4Layout& layout, const uint8_t* numbers, const char* scales, const uint8_t* zeros, int columns, char* panel) {
    const int size = scale_bytes(layout.scale_kind), bytes = layout.group * layout.groups / 2;  // bytes of a column
    std::memset(panel, 0, layout.panel_bytes);
    for (int column = 0; column < columns; column++) {
        for (int g = 0; g < layout.groups; g++) {
            const int64_t of = (int64_t)column * layout.groups + g, place = (int64_t)g * LANES + column;
            std::memcpy(panel + place * size, scales + of * size, size);
            if (zeros) panel[layout.zeros_at + place] = (char)zeros[of];
        }
        const uint8_t* pairs = numbers + (int64_t)column * bytes;
        char* lane = panel + layout.lines_at + column * 4;
        for (int at = 0; at < bytes; at += LINE_PAIRS, lane += LINE_BYTES) {
            uint32_t word = 0;
            for (int i = 0; i < LINE_PAIRS; i++) word |= (pairs[at + i] & 15u) << 4 * i | (uint32_t)(pairs[at + i] >> 4) << (16 + 4 * i);
            word ^= 0x88888888u;  // minus CENTRE, signed
            std::memcpy(lane, &word, 4);
        }
    }
}

// Call `panel(index, first column, number of columns)` for all panels.
template <class F>
void for_panels(Threads& threads, int columns, const F& panel) {
    threads.share((columns + LANES - 1) / LANES,
                  [&](int i) { panel(i, (int64_t)i * LANES, std::min(LANES, columns - i * LANES)); });
}

}  // namespace

extern "C" {

int64_t twostroke_panel_bytes(int32_t kind, int32_t inner, int32_t pairs) {
    if (kind == INT8 && pairs) return int8_panel_bytes(inner);
    return (int64_t)LANES * (pairs ? (inner + 1) / 2 * 2 : inner) * number_bytes(kind);
}

int64_t twostroke_int4_panel_bytes(int32_t inner, int32_t group, int32_t scale_kind, int32_t has_zeros) {
    return Int4Layout(inner, group, scale_kind, has_zeros).panel_bytes;
}

int64_t twostroke_coded_panel_bytes(Threads* threads, const uint16_t* from, int32_t columns, int32_t inner) {
    constexpr int NUMBERS_PER_ODD = 1024;  // decoding an odd weight costs as much as about 60 others
    if (!coded::DECODES || inner % coded::INNER_MULTIPLE) return 0;
    std::atomic<int> most{0};
    for_panels(*threads, columns, [&](int, int64_t first, int count) {
        const int odd = Exponents(from + first * inner, count, inner).num_odd();
        for (int seen = most.load(); seen < odd && !most.compare_exchange_weak(seen, odd);) {
        }
    });
    const int num_odd = most.load();
    if (num_odd > std::max(4, LANES * inner / NUMBERS_PER_ODD)) return 0;
    return coded::header_bytes(num_odd) + coded::groups_bytes(inner);
}

void twostroke_pack(Threads* threads, const void* from, int32_t kind, int32_t columns, int32_t inner, int32_t pairs,
                    int64_t panel_bytes, void* to) {
    for_panels(*threads, columns, [&](int i, int64_t first, int count) {
        const char* rows = (const char*)from + first * inner * number_bytes(kind);
        char* panel = (char*)to + i * panel_bytes;
        if (kind == CODED) return pack_coded((const uint16_t*)rows, count, inner, panel_bytes, panel);
        if (kind == INT8 && pairs) return pack_int8((const int8_t*)rows, count, inner, (uint8_t*)panel);
        pack_plain(rows, number_bytes(kind), count, inner, pairs ? 2 : 1, panel);
    });
}

void twostroke_pack_int4(Threads* threads, const uint8_t* numbers, const void* scales, const uint8_t* zeros, const Matrix* matrix) {
    const Int4Layout layout(*matrix);
    for_panels(*threads, matrix->columns, [&](int i, int64_t first, int count) {
        pack_int4(layout, numbers + first * matrix->inner / 2, (const char*)scales + first * layout.groups * scale_bytes(layout.scale_kind),
                  zeros ? zeros + first * layout.groups : nullptr, count, (char*)matrix->panels + i * layout.panel_bytes);
    });
}

}  // extern "C"
