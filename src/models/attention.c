// softmax(q k^T / sqrt(d)) v in bfloat16, a block of queries at a time, so that no matrix of all queries and keys is
// kept: the backward pass computes it anew (Dao et al. 2022, "FlashAttention", Sec. 3.1), from the greatest logit and the
// sum of each query, kept apart: the logarithm of sums that is usual would lose the digits behind those of the logits.
// Logits, softmax and all sums are float; the softmax and its gradient are rounded once, to be multiplied.
#include <math.h>

#include "products.h"

#ifdef PRODUCTS

enum { QUERIES = 128 };  // of a block; even

// Of q, k, v (B, N, 3, heads, d) one head of one image, and of a matrix (B, N, heads, d).
typedef struct {
    long N, padded, d, row, out_row;  // padded: to columns of a product; rows in numbers
    float scale;
} Head;

INLINE vec exponential(vec x) {  // to 2e-7; x <= 0 or little above
    x = _mm512_max_ps(_mm512_set1_ps(-110.f), x);  // of which float has no exponential; not a number stays that
    vec whole = _mm512_roundscale_ps(x * _mm512_set1_ps(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
    f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), f);
    vec p = _mm512_set1_ps(1.f / 720);
    const float of[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(of[i]));
    return _mm512_scalef_ps(p, whole);
}

// (N, d) to (padded / COLS, d / 2, COLS) pairs of channels: the right of a sum over channels
static void across(const uint16_t *x, long row, Head h, uint32_t *y) {
    for (long n = 0; n < h.padded; n += COLS)
        for (long c = 0; c < h.d / 2; c++, y += COLS)
            for (long i = 0; i < COLS; i++) y[i] = n + i < h.N ? ((const uint32_t *)(x + (n + i) * row))[c] : 0;
}

// (N, d) to (d / COLS, padded / 2, COLS) pairs of positions: the right of a sum over positions
static void along(const uint16_t *x, long row, Head h, uint32_t *y) {
    const vec none = _mm512_setzero_ps();
    for (long c = 0; c < h.d; c += COLS)
        for (long n = 0; n < h.padded; n += 2, y += COLS)
            for (long i = 0; i < COLS; i += 16) {
                const uint16_t *at = x + n * row + c + i;
                store_pairs(y + i, n < h.N ? load16(at) : none, n + 1 < h.N ? load16(at + row) : none);
            }
}

INLINE Left rows_of(const void *x, long row) { return (Left){(const uint32_t *)x, row / 2, 1}; }

INLINE void store_scaled(const float *from, float scale, uint16_t *to) {
    const vec s = _mm512_set1_ps(scale);
    for (long i = 0; i < COLS; i += 16) store16(to + i, s * _mm512_loadu_ps(from + i));
}

INLINE __mmask16 inside(Head h, long m) { return m + 16 <= h.N ? 0xffff : m < h.N ? (1 << (h.N - m)) - 1 : 0; }

INLINE float greatest(const float *S, Head h) {
    const vec least = _mm512_set1_ps(-INFINITY);
    vec most = least;
    for (long m = 0; m < h.padded; m += 16)
        most = _mm512_max_ps(_mm512_mask_loadu_ps(least, inside(h, m), S + m), most);
    return _mm512_reduce_max_ps(most);
}

// exp(scale (S - most)) times a number, zero beyond N, of a row; and its sum
INLINE float softmax_row(float *S, Head h, float most, float times) {
    vec sum = _mm512_setzero_ps();
    const vec scale = _mm512_set1_ps(h.scale), less = _mm512_set1_ps(most), by = _mm512_set1_ps(times);
    for (long m = 0; m < h.padded; m += 16) {
        vec e = _mm512_maskz_mov_ps(inside(h, m), by * exponential(scale * (_mm512_loadu_ps(S + m) - less)));
        _mm512_storeu_ps(S + m, e);
        sum += e;
    }
    return _mm512_reduce_add_ps(sum);
}

static void forward(Head h, const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o, float *stats,
                    uint32_t *scratch) {
    uint32_t *K = scratch, *V = K + h.padded * h.d / 2;
    float *S = (float *)(V + h.padded * h.d / 2), *O = S + QUERIES * h.padded;
    uint16_t *P = (uint16_t *)(O + QUERIES * COLS);
    across(k, h.row, h, K);
    along(v, h.row, h, V);
    for (long first = 0; first < h.N; first += QUERIES) {
        long rows = first + QUERIES < h.N ? QUERIES : h.N - first;
        float one_over[QUERIES];
        for (long m = 0; m < h.padded; m += COLS)
            product(rows, rows_of(q + first * h.row, h.row), K + m * h.d / 2, h.d / 2, S + m, h.padded, 0);
        for (long n = 0; n < rows; n++) {
            float *s = S + n * h.padded, *of = stats + 2 * (first + n);
            of[0] = greatest(s, h);
            of[1] = one_over[n] = 1 / softmax_row(s, h, of[0], 1);
            for (long m = 0; m < h.padded; m += 16) store16(P + n * h.padded + m, _mm512_loadu_ps(s + m));
        }
        for (long c = 0; c < h.d; c += COLS) {
            product(rows, rows_of(P, h.padded), V + c * h.padded / 2, h.padded / 2, O, COLS, 0);
            for (long n = 0; n < rows; n++) store_scaled(O + n * COLS, one_over[n], o + (first + n) * h.out_row + c);
        }
    }
}

// dq, dk, dv lie as q, k, v do.
static void backward(Head h, const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *d_o,
                     const float *stats, uint16_t *dq, uint16_t *dk, uint16_t *dv, uint32_t *scratch) {
    long image = h.padded * h.d / 2, block = QUERIES * h.padded;
    uint32_t *K = scratch, *V = K + image, *Ka = V + image, *Qa = Ka + image, *dOa = Qa + image;
    uint32_t *Pa = dOa + image, *dSa = Pa + block / 2;  // (QUERIES / 2, padded) pairs of queries
    float *S = (float *)(dSa + block / 2), *dP = S + block, *dK = dP + block, *dV = dK + h.padded * h.d;
    float *dQ = dV + h.padded * h.d;
    uint16_t *dS = (uint16_t *)(dQ + QUERIES * COLS);
    across(k, h.row, h, K), across(v, h.row, h, V);
    along(k, h.row, h, Ka), along(q, h.row, h, Qa), along(d_o, h.out_row, h, dOa);
    for (long first = 0; first < h.N; first += QUERIES) {
        long rows = first + QUERIES < h.N ? QUERIES : h.N - first, pairs = (rows + 1) / 2;
        for (long m = 0; m < h.padded; m += COLS) {
            product(rows, rows_of(q + first * h.row, h.row), K + m * h.d / 2, h.d / 2, S + m, h.padded, 0);
            product(rows, rows_of(d_o + first * h.out_row, h.out_row), V + m * h.d / 2, h.d / 2, dP + m, h.padded, 0);
        }
        for (long n = 0; n < 2 * pairs; n++) {
            float *s = S + n * h.padded, *dp = dP + n * h.padded;
            if (n == rows) {  // a last one without another
                memset(s, 0, h.padded * sizeof *s), memset(dp, 0, h.padded * sizeof *dp);
                continue;
            }
            softmax_row(s, h, stats[2 * (first + n)], stats[2 * (first + n) + 1]);
            vec sum = _mm512_setzero_ps();
            for (long m = 0; m < h.padded; m += 16) sum += _mm512_loadu_ps(s + m) * _mm512_loadu_ps(dp + m);
            const vec less = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), scale = _mm512_set1_ps(h.scale);
            for (long m = 0; m < h.padded; m += 16) {
                vec ds = scale * _mm512_loadu_ps(s + m) * (_mm512_loadu_ps(dp + m) - less);
                _mm512_storeu_ps(dp + m, ds);
                store16(dS + n * h.padded + m, ds);
            }
        }
        for (long n = 0; n < pairs; n++)
            for (long m = 0; m < h.padded; m += 16) {
                const float *s = S + 2 * n * h.padded + m, *ds = dP + 2 * n * h.padded + m;
                store_pairs(Pa + n * h.padded + m, _mm512_loadu_ps(s), _mm512_loadu_ps(s + h.padded));
                store_pairs(dSa + n * h.padded + m, _mm512_loadu_ps(ds), _mm512_loadu_ps(ds + h.padded));
            }
        for (long c = 0; c < h.d; c += COLS) {
            long at = c * h.padded / 2 + first / 2 * COLS;
            product(h.N, (Left){Pa, 1, h.padded}, dOa + at, pairs, dV + c, h.d, first > 0);
            product(h.N, (Left){dSa, 1, h.padded}, Qa + at, pairs, dK + c, h.d, first > 0);
            product(rows, rows_of(dS, h.padded), Ka + c * h.padded / 2, h.padded / 2, dQ, COLS, 0);
            for (long n = 0; n < rows; n++) store_scaled(dQ + n * COLS, 1, dq + (first + n) * h.row + c);
        }
    }
    for (long n = 0; n < h.N; n++)
        for (long c = 0; c < h.d; c += COLS) {
            store_scaled(dK + n * h.d + c, 1, dk + n * h.row + c);
            store_scaled(dV + n * h.d + c, 1, dv + n * h.row + c);
        }
}

// qkv (B, N, 3, heads, d), d a multiple of 32, to o (B, N, heads, d) and stats (B, heads, N, 2), the greatest q k
// and one over the sum; or, where do is given, to the gradient of qkv. Returns 1 if there was no memory.
static int attention_of(const uint16_t *qkv, uint16_t *o, float *stats, const uint16_t *d_o, uint16_t *dqkv, long B,
                        long N, long heads, long d, int threads) {
    long padded = (N + COLS - 1) / COLS * COLS, all = heads * d;
    Head h = {N, padded, d, 3 * all, all, 1 / sqrtf((float)d)};
    long numbers = d_o ? 5 * padded * d / 2 + 2 * padded * d + QUERIES * (7 * padded / 2 + COLS)
                       : padded * d + QUERIES * (3 * padded / 2 + COLS);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint32_t *scratch = floats(numbers);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long i = 0; i < B * heads; i++) {
            if (!scratch) continue;
            long from = i / heads * N * 3 * all + i % heads * d, to = i / heads * N * all + i % heads * d;
            const uint16_t *q = qkv + from, *k = q + all, *v = k + all;
            if (d_o) {
                uint16_t *dq = dqkv + from;
                backward(h, q, k, v, d_o + to, stats + 2 * i * N, dq, dq + all, dq + 2 * all, scratch);
            } else forward(h, q, k, v, o + to, stats + 2 * i * N, scratch);
        }
        free(scratch);
    }
    return failed;
}

int attention(const uint16_t *qkv, uint16_t *o, float *stats, long B, long N, long heads, long d, int threads) {
    return attention_of(qkv, o, stats, NULL, NULL, B, N, heads, d, threads);
}

int attention_gradient(const uint16_t *qkv, float *stats, const uint16_t *d_o, uint16_t *dqkv, long B, long N,
                       long heads, long d, int threads) {
    return attention_of(qkv, NULL, stats, d_o, dqkv, B, N, heads, d, threads);
}
#endif
