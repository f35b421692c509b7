/* Loops that do one thing at the machine's full rate: reading memory, float products, byte products. Built by limits.py. */
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FLOATS 16
#else
#define FLOATS 8
#endif
typedef float floats __attribute__((vector_size(4 * FLOATS)));
#define NUM_SUMS 12 /* latency 4, two units: 8 are enough */

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
        floats sums[NUM_SUMS], x, y;
        for (int i = 0; i < FLOATS; i++) { x[i] = kept[0]; y[i] = kept[1]; }
        for (int s = 0; s < NUM_SUMS; s++) sums[s] = x * (float)s;
        for (long t = 0; t < times; t++) {
            #pragma GCC unroll 12
            for (int s = 0; s < NUM_SUMS; s++) {
                sums[s] = sums[s] * x + y;
                __asm__ volatile("" : "+x"(sums[s]));
            }
        }
        for (int s = 1; s < NUM_SUMS; s++) sums[0] += sums[s];
        #pragma omp critical
        kept[2] += sums[0][0];
    }
    return (double)times * NUM_SUMS * FLOATS * threads;
}

/* Products of bytes, summed in 32 bits, by the instructions of this machine; 0: it has none that is known here. */
double multiply_bytes(long times, int threads, int *kept) {
#if defined(__AVX512VNNI__)
    #pragma omp parallel num_threads(threads)
    {
        __m512i sums[NUM_SUMS], x = _mm512_set1_epi32(kept[0]), y = _mm512_set1_epi32(kept[1]);
        for (int s = 0; s < NUM_SUMS; s++) sums[s] = _mm512_set1_epi32(s);
        for (long t = 0; t < times; t++)
            #pragma GCC unroll 12
            for (int s = 0; s < NUM_SUMS; s++) {
                sums[s] = _mm512_dpbusd_epi32(sums[s], x, y);
                __asm__ volatile("" : "+x"(sums[s]));
            }
        for (int s = 1; s < NUM_SUMS; s++) sums[0] = _mm512_add_epi32(sums[0], sums[s]);
        #pragma omp critical
        kept[2] += _mm512_cvtsi512_si32(sums[0]);
    }
    return (double)times * NUM_SUMS * 64 * threads;
#elif defined(__AVX2__)
    #pragma omp parallel num_threads(threads)
    {
        __m256i sums[NUM_SUMS], x = _mm256_set1_epi32(kept[0]), y = _mm256_set1_epi32(kept[1]);
        const __m256i ones = _mm256_set1_epi16(1);
        for (int s = 0; s < NUM_SUMS; s++) sums[s] = _mm256_set1_epi32(s);
        for (long t = 0; t < times; t++)
            #pragma GCC unroll 12
            for (int s = 0; s < NUM_SUMS; s++) {
                __m256i pairs = _mm256_maddubs_epi16(x, y);
                __asm__ volatile("" : "+x"(pairs)); /* computed anew for every sum */
                sums[s] = _mm256_add_epi32(sums[s], _mm256_madd_epi16(pairs, ones));
                __asm__ volatile("" : "+x"(sums[s]));
            }
        for (int s = 1; s < NUM_SUMS; s++) sums[0] = _mm256_add_epi32(sums[0], sums[s]);
        #pragma omp critical
        kept[2] += _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[0]));
    }
    return (double)times * NUM_SUMS * 32 * threads;
#else
    return 0.0;
#endif
}
