// Sixteen 32-bit lanes as two registers of eight, for machines with AVX2 and without AVX-512. A vector type of 64 bytes would be
// correct there too, but compilers pass it through memory at every operation.
//
// The operators are those of the compiler's vector types: lane by lane, a number is one for all lanes, comparisons give lanes of
// all ones or zeros, and a conversion with () keeps the bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#define TWOSTROKE_AVX2 1

#include <immintrin.h>

#define TWOSTROKE_INLINE __attribute__((always_inline)) inline

namespace simd {

template <class T>
struct alignas(64) Halves {
    typedef T Half __attribute__((vector_size(32)));
    Half lo, hi;

    Halves() = default;
    TWOSTROKE_INLINE Halves(Half low, Half high) : lo(low), hi(high) {}
    template <class U>
    TWOSTROKE_INLINE explicit Halves(const Halves<U>& bits) : lo((Half)bits.lo), hi((Half)bits.hi) {}
    constexpr Halves(T a, T b, T c, T d, T e, T f, T g, T h, T i, T j, T k, T l, T m, T n, T o, T p)
        : lo{a, b, c, d, e, f, g, h}, hi{i, j, k, l, m, n, o, p} {}

    TWOSTROKE_INLINE T& operator[](int lane) { return ((T*)this)[lane]; }
    TWOSTROKE_INLINE T operator[](int lane) const { return ((const T*)this)[lane]; }

#define TWOSTROKE_OPERATOR(op)                                                                             \
    TWOSTROKE_INLINE friend Halves operator op(Halves a, Halves b) { return {a.lo op b.lo, a.hi op b.hi}; } \
    TWOSTROKE_INLINE friend Halves operator op(Halves a, T b) { return {a.lo op b, a.hi op b}; }            \
    TWOSTROKE_INLINE friend Halves operator op(T a, Halves b) { return {a op b.lo, a op b.hi}; }            \
    TWOSTROKE_INLINE Halves& operator op##=(Halves b) { return *this = *this op b; }
    TWOSTROKE_OPERATOR(+)
    TWOSTROKE_OPERATOR(-)
    TWOSTROKE_OPERATOR(*)
    TWOSTROKE_OPERATOR(/)
    TWOSTROKE_OPERATOR(&)
    TWOSTROKE_OPERATOR(|)
#undef TWOSTROKE_OPERATOR
#define TWOSTROKE_COMPARISON(op)                                                                               \
    TWOSTROKE_INLINE friend Halves<int32_t> operator op(Halves a, Halves b) { return {a.lo op b.lo, a.hi op b.hi}; } \
    TWOSTROKE_INLINE friend Halves<int32_t> operator op(Halves a, T b) { return {a.lo op b, a.hi op b}; }
    TWOSTROKE_COMPARISON(<)
    TWOSTROKE_COMPARISON(>)
    TWOSTROKE_COMPARISON(<=)
    TWOSTROKE_COMPARISON(>=)
    TWOSTROKE_COMPARISON(==)
    TWOSTROKE_COMPARISON(!=)
#undef TWOSTROKE_COMPARISON
    TWOSTROKE_INLINE Halves operator-() const { return {-lo, -hi}; }
    TWOSTROKE_INLINE Halves operator~() const { return {~lo, ~hi}; }
    TWOSTROKE_INLINE Halves operator<<(int bits) const { return {lo << bits, hi << bits}; }
    TWOSTROKE_INLINE Halves operator>>(int bits) const { return {lo >> bits, hi >> bits}; }
};

typedef Halves<float> F32;
typedef Halves<int32_t> I32;
typedef Halves<uint32_t> U32;

}  // namespace simd

#endif
