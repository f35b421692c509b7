// Products of float32 or bfloat16 rows with 4-bit matrices: linear/int4.h has the definition and the layout. Machines with AVX2 and
// without AVX-512: linear/int4_avx2.cpp. Machines with AMX tiles multiply as those without.
#include "int4.h"

#include "api.h"
#include "row_blocks.h"

#if !defined(TWOSTROKE_AVX2)

namespace linear {

namespace {

constexpr int64_t CACHED_AHEAD = 128 << 10;  // up to this size, the next panels are prefetched while these are read (measured)

#if defined(__AVX512BF16__)
// Signed numbers of four bits in bfloat16, twice: an index has five bits, of which the fifth belongs to a neighbour.
alignas(64) constexpr uint16_t SIGNED[32] = {
    0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
    0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};

// Multiplies pairs of neighbours in k of sixteen columns with pairs of bfloat16 of a row.
class Pairs {
   public:
    static constexpr int ROW_BYTES = 4;  // of a row, per pair
    typedef U32 Numbers;
    Numbers take(U32 line, int pair) const {
        return (U32)_mm512_permutexvar_epi16(_mm512_srli_epi32((__m512i)line, 4 * pair), table_);
    }
    static F32 add(F32 acc, const Numbers& w, const char* x) {
        uint32_t both;
        std::memcpy(&both, x, 4);
        return dot_pairs(acc, w, splat_u32(both));
    }

   private:
    const __m512i table_ = _mm512_load_si512(SIGNED);
};
#endif

// The same with rows of a kind, in float32.
template <int KIND>
class Floats {
   public:
    static constexpr int ROW_BYTES = KIND == BFLOAT16 ? 4 : 8;
    struct Numbers {
        F32 even, odd;
    };
    Numbers take(U32 line, int pair) const { return {number(line, 2 * pair), number(line, 2 * pair + 1)}; }
    static F32 add(F32 acc, const Numbers& w, const char* x) {
        uint32_t one, other;
        std::memcpy(&one, x, 4);
        if (KIND == BFLOAT16) {
            const U32 both = splat_u32(one);
            return fma(w.odd, (F32)(both & 0xFFFF0000u), fma(w.even, (F32)(both << 16), acc));
        }
        std::memcpy(&other, x + 4, 4);
        return fma(w.odd, (F32)splat_u32(other), fma(w.even, (F32)splat_u32(one), acc));
    }

   private:
#if defined(__AVX512F__)
    F32 number(U32 line, int at) const {
        return (F32)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)line, 4 * (at / 2) + 16 * (at % 2)), table_);
    }
    const __m512 table_ = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0);
#else
    F32 number(U32 line, int at) const { return line_number(line, at); }
#endif
};

struct Product {
    const Job& job;
    const Int4Layout layout;
    const GroupSums& sums;

    const char* panel(int i) const { return (const char*)job.matrix->panels + i * layout.panel_bytes; }
};

// Multiply ROWS rows by panels [panel, panel + PANELS). Four rows share an address register, as in linear.cpp.
template <class W, int ROWS, int PANELS>
void kernel(const Product& product, const Block& block, int panel, F32* gates) {
    const Int4Layout& layout = product.layout;
    const int64_t stride = block.stride, places[4] = {0, stride, 2 * stride, 3 * stride}, bytes = layout.panel_bytes;
    const char *x0 = block.x, *x4 = x0 + 4 * stride, *x8 = x4 + 4 * stride, *x12 = x8 + 4 * stride;
    const char *const from = product.panel(panel), *at = from + layout.lines_at;
    const int64_t ahead = PANELS * bytes <= CACHED_AHEAD ? PANELS * bytes : PREFETCH_BYTES;
    const W numbers;
    F32 sums[ROWS][PANELS] = {};
    for (int group = 0; group < layout.groups; group++) {
        F32 acc[ROWS][PANELS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) acc[r][p] = F32{};
        for (const char* end = at + layout.group_bytes(); at < end; at += LINE_BYTES) {
            U32 lines[PANELS];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) {
                __builtin_prefetch(at + p * bytes + ahead, 0, 2);
                lines[p] = load<U32>(at + p * bytes);
            }
#pragma GCC unroll 4
            for (int pair = 0; pair < LINE_PAIRS; pair++) {
                typename W::Numbers w[PANELS];
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; p++) w[p] = numbers.take(lines[p], pair);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) {
                    const char* x = (r < 4 ? x0 : r < 8 ? x4 : r < 12 ? x8 : x12) + places[r % 4] + pair * W::ROW_BYTES;
#pragma GCC unroll 4
                    for (int p = 0; p < PANELS; p++) acc[r][p] = W::add(acc[r][p], w[p], x);
                }
            }
            constexpr int STEP = LINE_PAIRS * W::ROW_BYTES;
            x0 += STEP, x4 += STEP, x8 += STEP, x12 += STEP;
            asm("" : "+r"(x0));  // keeps the compiler from one address register per row
            if (ROWS > 4) asm("" : "+r"(x4));
            if (ROWS > 8) asm("" : "+r"(x8));
            if (ROWS > 12) asm("" : "+r"(x12));
        }
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const char* one = from + p * bytes;
            const F32 scales = layout.scales(one, group);
            F32 shifts{};
            if (layout.has_zeros) shifts = layout.shifts(one, group);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                F32 sum = acc[r][p];
                if (layout.has_zeros && r < block.rows) sum = fma(shifts, splat(product.sums.of(block.first + r, group)), sum);
                sums[r][p] = fma(sum, scales, sums[r][p]);
            }
        }
    }
#pragma GCC unroll 1
    for (int r = 0; r < block.rows; r++) {
        constexpr int TOGETHER = PANELS < 2 ? 1 : 2;
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p += TOGETHER)
            put_row<TOGETHER>(product.job, block.first + r, panel + p, (const F32(&)[TOGETHER])sums[r][p], gates[r]);
    }
}

// As many panels at once as leave registers for the sums: sums that do not depend on each other hide the products' latency.
template <class W, int ROWS>
void panels(const Product& product, const Block& block, int begin, int end, F32* gates) {
    constexpr int MOST = ROWS <= 2 ? 4 : ROWS <= WIDE_ROWS ? WIDE_PANELS : 1;
    int panel = begin;
    for (; panel + MOST <= end; panel += MOST) kernel<W, ROWS, MOST>(product, block, panel, gates);
    if (MOST > 2)
        for (; panel + 2 <= end; panel += 2) kernel<W, ROWS, 2>(product, block, panel, gates);
    for (; panel < end; panel++) kernel<W, ROWS, 1>(product, block, panel, gates);
}

template <class W>
void multiply_block(const Product& product, const Block& block, int begin, int end, F32* gates) {
    switch (padded_rows(block.rows)) {
        case 1: return panels<W, 1>(product, block, begin, end, gates);
        case 2: return panels<W, 2>(product, block, begin, end, gates);
        case 4: return panels<W, 4>(product, block, begin, end, gates);
#if defined(__AVX512F__)
        case 6: return panels<W, 6>(product, block, begin, end, gates);
        case 8: return panels<W, 8>(product, block, begin, end, gates);
        case 12: return panels<W, 12>(product, block, begin, end, gates);
        case 16: return panels<W, 16>(product, block, begin, end, gates);
#endif
    }
}

template <class W>
void multiply_blocks(const Product& product, const Blocks& x, Threads& threads) {
    share_panels(product.job, threads, product.layout.panel_bytes, [&](int begin, int end) {
        F32 gates[TALL_ROWS];
        for (int first = 0; first < product.job.num_rows; first += x.size())
            multiply_block<W>(product, x.from(first), begin, end, gates);
    });
}

// Rows of x with their numbers in the matrix's order: x itself if it has none, else copies at `to`.
Rows in_order(const Matrix& m, const Rows& x, char* to, Threads& threads) {
    if (!m.order) return x;
    const int size = x.kind == BFLOAT16 ? 2 : 4;
    threads.share(x.rows, [&](int row) {
        const char* from = (const char*)x.data + row * x.stride * size;
        char* out = to + (int64_t)row * m.inner * size;
        for (int k = 0; k < m.inner; k++) std::memcpy(out + (int64_t)k * size, from + (int64_t)m.order[k] * size, size);
    });
    return {to, m.inner, x.rows, x.kind};
}

}  // namespace

void multiply_int4(const Job& job, const Rows& given, uint32_t* scratch, Threads& threads) {
    const Matrix& m = *job.matrix;
    const Rows x = in_order(m, given, (char*)scratch, threads);
    const int words = x.kind == BFLOAT16 ? m.inner / 2 : m.inner;  // of a row
    const GroupSums sums(m, x, nullptr, threads);
    const Blocks blocks(x, words, (char*)scratch + (m.order ? (int64_t)x.rows * words * 4 : 0));
    const Product product{job, Int4Layout(m), sums};
    if (x.kind == FLOAT32) return multiply_blocks<Floats<FLOAT32>>(product, blocks, threads);
#if defined(__AVX512BF16__)
    multiply_blocks<Pairs>(product, blocks, threads);
#else
    multiply_blocks<Floats<BFLOAT16>>(product, blocks, threads);
#endif
}

}  // namespace linear

#endif
