// Dropout whose masks are hashes of a row's key and an element's place: see dropout.py, which says the same.
#include "half.h"

INLINE uint32_t scramble(uint32_t x) {  // of randomness.py
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

INLINE void row(const void *restrict x, void *restrict y, uint32_t key, uint32_t N, int lowest, float scale, int half) {
    _Pragma("omp simd") for (uint32_t e = 0; e < N; e++) {
        uint32_t bits = scramble((e >> 1) * 0x9e3779b9u + key);  // of two elements
        int own = (int16_t)(e & 1 ? bits >> 16 : bits);
        store(y, e, load(x, e, half) * (own >= lowest ? scale : 0.f), half);
    }
}

// B rows of N elements each, one after the other in memory; what is kept is multiplied by scale.
void dropout(const void *x, void *y, const int32_t *keys, long B, long N, int lowest, double scale, int half,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < B; b++) {
        long first = b * N * (half ? 2 : 4);
        const void *from = (const char *)x + first;
        void *to = (char *)y + first;
        if (half) row(from, to, keys[b], N, lowest, scale, 1);
        else row(from, to, keys[b], N, lowest, scale, 0);
    }
}
