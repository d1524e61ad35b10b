// Products of matrices of bfloat16, summed in float, by the CPU's instruction for them. Two numbers that follow each
// other on the axis of a sum are one element, a pair, as that instruction takes them.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(NO_PRODUCTS)
#define PRODUCTS
#include <immintrin.h>

enum {
    ROWS = 14,  // of a product that registers hold, by
    COLS = 32,  // columns
};

typedef __m512 vec;

INLINE vec load16(const uint16_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

INLINE void store16(void *y, vec v) { _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE void store_pairs(uint32_t *y, vec even, vec odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(y, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

INLINE void *floats(long count) { return aligned_alloc(64, (4 * count + 63) / 64 * 64); }

// A matrix of pairs: where it begins, and how far apart its rows and its pairs are.
typedef struct {
    const uint32_t *first;
    long row, pair;
} Left;

INLINE void product_of(int rows, Left a, const uint32_t *b, long K, float *m, long m_row, int add) {
    vec sums[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) sums[r][v] = add ? _mm512_loadu_ps(m + r * m_row + 16 * v) : _mm512_setzero_ps();
    for (long k = 0; k < K; k++) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * COLS);
        __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * COLS + 16);
        for (int r = 0; r < rows; r++) {
            __m512bh s = (__m512bh)_mm512_set1_epi32((int)a.first[r * a.row + k * a.pair]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], s, b0);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], s, b1);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(m + r * m_row + 16 * v, sums[r][v]);
}

// (M, COLS) = (M, K pairs) (K pairs, COLS), or that much more; in groups of as equal numbers of rows as can be
static void product(long M, Left a, const uint32_t *b, long K, float *m, long m_row, int add) {
    long groups = (M + ROWS - 1) / ROWS;
    for (; groups > 0; groups--) {
        int rows = (int)((M + groups - 1) / groups);
        switch (rows) {
#define OF(R)                                   \
    case R:                                     \
        product_of(R, a, b, K, m, m_row, add);  \
        break;
            OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12) OF(13) OF(14)
#undef OF
        }
        M -= rows, a.first += rows * a.row, m += rows * m_row;
    }
}
#endif
