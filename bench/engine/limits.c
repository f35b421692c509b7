/* Loops that do one thing at the machine's full rate: reading memory, float products, byte products. Built by limits.py. */
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FLOATS 16
#elif defined(__AVX__)
#define FLOATS 8
#else
#define FLOATS 4
#endif
typedef float floats __attribute__((vector_size(4 * FLOATS)));
/* Twelve sums in variables of their own: an array of them is kept in memory, and the loop waits for that. A product takes
   four cycles and there are two units, so eight sums are enough. */
#define TWELVE(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define NUM_SUMS 12

/* The sum of all words; four sums, so that additions are never what it waits for. */
uint64_t read_all(const uint64_t *words, size_t count, int threads) {
    uint64_t total = 0;
    #pragma omp parallel for num_threads(threads) reduction(+:total) schedule(static)
    for (size_t block = 0; block < count / 4096; block++) {
        const uint64_t *p = words + block * 4096;
        uint64_t a = 0, b = 0, c = 0, d = 0;
        for (size_t i = 0; i < 4096; i += 32) {
            __builtin_prefetch((const char *)(p + i) + 4096);
            __builtin_prefetch((const char *)(p + i) + 4160);
            __builtin_prefetch((const char *)(p + i) + 4224);
            __builtin_prefetch((const char *)(p + i) + 4288);
            for (size_t j = 0; j < 8; j++) {
                a += p[i + j]; b += p[i + 8 + j]; c += p[i + 16 + j]; d += p[i + 24 + j];
            }
        }
        total += a + b + c + d;
    }
    return total;
}

/* Fused products and sums of floats in registers; returns how many products were computed. */
double multiply_floats(long times, int threads, float *kept) {
    #pragma omp parallel num_threads(threads)
    {
        floats x, y, total = {0};
        for (int i = 0; i < FLOATS; i++) { x[i] = kept[0]; y[i] = kept[1]; }
#define BEGIN(n) floats sum##n = x * (float)n;
#define STEP(n) sum##n = sum##n * x + y; __asm__ volatile("" : "+x"(sum##n));
#define END(n) total += sum##n;
        TWELVE(BEGIN)
        for (long t = 0; t < times; t++) { TWELVE(STEP) }
        TWELVE(END)
#undef BEGIN
#undef STEP
#undef END
        #pragma omp critical
        kept[2] += total[0];
    }
    return (double)times * NUM_SUMS * FLOATS * threads;
}

/* Products of bytes, summed in 32 bits, by the instructions of this machine; 0: it has none that is known here. */
double multiply_bytes(long times, int threads, int *kept) {
#if defined(__AVX512VNNI__)
#define INTS __m512i
#define SET _mm512_set1_epi32
#define ADD _mm512_add_epi32
#define FIRST _mm512_cvtsi512_si32
#define STEP(n) sum##n = _mm512_dpbusd_epi32(sum##n, x, y); __asm__ volatile("" : "+x"(sum##n));
#elif defined(__AVX2__)
#define INTS __m256i
#define SET _mm256_set1_epi32
#define ADD _mm256_add_epi32
#define FIRST(v) _mm_cvtsi128_si32(_mm256_castsi256_si128(v))
/* The barrier behind the first instruction: it is computed anew for every sum. */
#define STEP(n) { \
    __m256i pairs = _mm256_maddubs_epi16(x, y); \
    __asm__ volatile("" : "+x"(pairs)); \
    sum##n = _mm256_add_epi32(sum##n, _mm256_madd_epi16(pairs, ones)); \
    __asm__ volatile("" : "+x"(sum##n)); \
}
#endif
#if defined(STEP)
    #pragma omp parallel num_threads(threads)
    {
        INTS x = SET(kept[0]), y = SET(kept[1]), total = SET(0);
#if !defined(__AVX512VNNI__)
        const __m256i ones = _mm256_set1_epi16(1);
#endif
#define BEGIN(n) INTS sum##n = SET(n);
#define END(n) total = ADD(total, sum##n);
        TWELVE(BEGIN)
        for (long t = 0; t < times; t++) { TWELVE(STEP) }
        TWELVE(END)
        #pragma omp critical
        kept[2] += FIRST(total);
    }
    return (double)times * NUM_SUMS * sizeof(INTS) * threads;
#else
    return 0.0;
#endif
}
