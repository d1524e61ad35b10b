// 3x3 convolutions of stride 1 with a border of zeros, in bfloat16, by F(2x2, 3x3) of Lavin & Gray 2016 ("Fast
// algorithms for convolutional neural networks", Sec. 4.1): a tile of 2x2 outputs Y comes from 4x4 inputs d and the
// filter g in 16 multiplications a channel, and not in 36,
//
//     Y = A^T [U * V] A,   U = G g G^T,   V = B^T d B,
//
//     B^T = 1  0 -1  0    G =  1   0   0     A^T = 1  1  1  0
//           0  1  1  0        1/2 1/2 1/2          0  1 -1 -1
//           0 -1  1  0        1/2-1/2 1/2
//           0  1  0 -1         0   0   1
//
// so that each of the 16 places is a product of matrices, of tiles by channels and of channels by channels. Images are
// channels-last, channels multiples of 32. U and V are rounded to bfloat16 once, all sums are float; a filter comes as
// float and is not rounded before it is transformed.
#include "products.h"

int products_known(void) {
#ifdef PRODUCTS
    return 1;
#else
    return 0;
#endif
}

#ifdef PRODUCTS

enum {
    TILES = 56,  // of one block of a forward pass: V and M stay in a cache of 1 MB, up to 500 channels
    APART = 32,  // numbers between places, which a cache would put one over the other
    DEPTH = 128,  // pairs of tiles of one block of a filter's gradient: threads wait for each other twice a block
};

// ---- Tiles ----

typedef struct {
    long H, W, h, w, tiles;  // of pixels, of tiles, of tiles of all images
} Grid;

INLINE Grid grid_of(long N, long H, long W) {
    long h = (H + 1) / 2, w = (W + 1) / 2;
    return (Grid){H, W, h, w, N * h * w};
}

// Where size x size pixels lie, from the first one of a tile less `border`; zeros for those outside.
INLINE void pixels(const uint16_t *x, const uint16_t *zeros, Grid g, long C, long tile, int size, int border,
                   const uint16_t **at) {
    long n = tile / (g.h * g.w), top = 2 * (tile / g.w % g.h) - border, left = 2 * (tile % g.w) - border;
    for (int a = 0; a < size; a++)
        for (int b = 0; b < size; b++) {
            long r = top + a, c = left + b;
            int inside = tile < g.tiles && r >= 0 && r < g.H && c >= 0 && c < g.W;
            at[size * a + b] = inside ? x + ((n * g.H + r) * g.W + c) * C : zeros;
        }
}

// V = B^T d B of 16 channels
INLINE void input_transform(const uint16_t *const *at, long channel, vec V[4][4]) {
    vec s[4][4];
    for (int b = 0; b < 4; b++) {
        vec d0 = load16(at[b] + channel), d1 = load16(at[4 + b] + channel);
        vec d2 = load16(at[8 + b] + channel), d3 = load16(at[12 + b] + channel);
        s[0][b] = d0 - d2, s[1][b] = d1 + d2, s[2][b] = d2 - d1, s[3][b] = d1 - d3;
    }
    for (int a = 0; a < 4; a++) {
        V[a][0] = s[a][0] - s[a][2], V[a][1] = s[a][1] + s[a][2];
        V[a][2] = s[a][2] - s[a][1], V[a][3] = s[a][1] - s[a][3];
    }
}

// A dY A^T of 16 channels, the adjoint of the output's transform
INLINE void output_adjoint(const uint16_t *const *at, long channel, vec D[4][4]) {
    vec s[4][2];
    for (int b = 0; b < 2; b++) {
        vec y0 = load16(at[b] + channel), y1 = load16(at[2 + b] + channel);
        s[0][b] = y0, s[1][b] = y0 + y1, s[2][b] = y0 - y1, s[3][b] = -y1;
    }
    for (int a = 0; a < 4; a++) {
        D[a][0] = s[a][0], D[a][1] = s[a][0] + s[a][1];
        D[a][2] = s[a][0] - s[a][1], D[a][3] = -s[a][1];
    }
}

// Y = A^T M A of 16 channels; the 16 places of M lie `place` numbers apart
INLINE void output_transform(const float *M, long place, vec bias, vec Y[2][2]) {
    vec s[2][4];
    for (int b = 0; b < 4; b++) {
        vec m0 = _mm512_loadu_ps(M + b * place), m1 = _mm512_loadu_ps(M + (4 + b) * place);
        vec m2 = _mm512_loadu_ps(M + (8 + b) * place), m3 = _mm512_loadu_ps(M + (12 + b) * place);
        s[0][b] = m0 + m1 + m2, s[1][b] = m1 - m2 - m3;
    }
    for (int a = 0; a < 2; a++) {
        Y[a][0] = s[a][0] + s[a][1] + s[a][2] + bias;
        Y[a][1] = s[a][1] - s[a][2] - s[a][3] + bias;
    }
}

// U = G g G^T of 16 channels of (3, 3, I)
INLINE void filter_transform(const float *g, long I, vec U[4][4]) {
    const vec half = _mm512_set1_ps(0.5f);
    vec s[4][3];
    for (int b = 0; b < 3; b++) {
        vec g0 = _mm512_loadu_ps(g + b * I), g1 = _mm512_loadu_ps(g + (3 + b) * I);
        vec g2 = _mm512_loadu_ps(g + (6 + b) * I);
        s[0][b] = g0, s[1][b] = half * (g0 + g1 + g2), s[2][b] = half * (g0 - g1 + g2), s[3][b] = g2;
    }
    for (int a = 0; a < 4; a++) {
        U[a][0] = s[a][0], U[a][1] = half * (s[a][0] + s[a][1] + s[a][2]);
        U[a][2] = half * (s[a][0] - s[a][1] + s[a][2]), U[a][3] = s[a][2];
    }
}

// dg = G^T dU G, its adjoint, to (3, 3, I); the 16 places of dU lie `place` numbers apart
INLINE void filter_adjoint(const float *dU, long place, long I, float *dg) {
    const vec half = _mm512_set1_ps(0.5f);
    vec s[3][4];
    for (int b = 0; b < 4; b++) {
        vec u0 = _mm512_loadu_ps(dU + b * place), u1 = half * _mm512_loadu_ps(dU + (4 + b) * place);
        vec u2 = half * _mm512_loadu_ps(dU + (8 + b) * place), u3 = _mm512_loadu_ps(dU + (12 + b) * place);
        s[0][b] = u0 + u1 + u2, s[1][b] = u1 - u2, s[2][b] = u1 + u2 + u3;
    }
    for (int a = 0; a < 3; a++) {
        vec u1 = half * s[a][1], u2 = half * s[a][2];
        _mm512_storeu_ps(dg + 3 * a * I, s[a][0] + u1 + u2);
        _mm512_storeu_ps(dg + (3 * a + 1) * I, u1 - u2);
        _mm512_storeu_ps(dg + (3 * a + 2) * I, u1 + u2 + s[a][3]);
    }
}

// ---- What is called ----

// U of w (O, 3, 3, I) float, as (16, O / COLS, I / 2, COLS) pairs.
void winograd_filters(const float *w, uint32_t *U, long I, long O, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < O; o += COLS)
        for (long i = 0; i < I; i += 16) {
            uint32_t turned[16][8][COLS];  // where U itself is so far apart that a cache would lose it
            for (long c = 0; c < COLS; c++) {
                vec u[4][4];
                filter_transform(w + (o + c) * 9 * I + i, I, u);
                for (int p = 0; p < 16; p++) {
                    uint32_t pairs[8];
                    store16(pairs, u[p / 4][p % 4]);
                    for (int k = 0; k < 8; k++) turned[p][k][c] = pairs[k];
                }
            }
            for (int p = 0; p < 16; p++) memcpy(U + (p * O + o) * (I / 2) + i / 2 * COLS, turned[p], sizeof turned[p]);
        }
}

// U of the convolution that takes the gradient of an output to that of its input: I and O exchanged, w turned by 180
// degrees, which exchanges the first and the last row of G; as (16, I / COLS, O / 2, COLS) pairs.
void winograd_turned_filters(const float *w, uint32_t *U, long I, long O, int threads) {
    static const int turned[4] = {3, 1, 2, 0};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < O; o += 2)
        for (long i = 0; i < I; i += 16) {
            vec even[4][4], odd[4][4];
            filter_transform(w + o * 9 * I + i, I, even);
            filter_transform(w + (o + 1) * 9 * I + i, I, odd);
            for (int p = 0; p < 16; p++) {
                int a = turned[p / 4], b = turned[p % 4];
                uint32_t *to = U + ((p * (I / COLS) + i / COLS) * (O / 2) + o / 2) * COLS + i % COLS;
                store_pairs(to, even[a][b], odd[a][b]);
            }
        }
}

// y (N, H, W, O) of x (N, H, W, I), of U and, if there is one, of a bias (O). Returns 1 if there was no memory.
int winograd(const uint16_t *x, const uint32_t *U, const float *bias, uint16_t *y, long N, long H, long W, long I,
             long O, int threads) {
    Grid g = grid_of(N, H, W);
    long blocks = (g.tiles + TILES * threads - 1) / (TILES * threads) * threads;  // as many for each thread
    long T = (g.tiles + blocks - 1) / blocks;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long place = T * I + APART;
        uint16_t *V = floats(16 * place / 2), *zeros = floats(I / 2);  // (16, T, I)
        float *M = floats(16 * T * COLS);                              // (16, T, COLS)
        int lacks = !V || !zeros || !M;
        if (lacks) {
#pragma omp atomic write
            failed = 1;
        } else memset(zeros, 0, I * 2);
#pragma omp for schedule(static)
        for (long first = 0; first < g.tiles; first += T) {
            long tiles = first + T < g.tiles ? T : g.tiles - first;
            for (long t = 0; t < tiles && !lacks; t++) {
                const uint16_t *at[16];
                pixels(x, zeros, g, I, first + t, 4, 1, at);
                for (long c = 0; c < I; c += 16) {
                    vec v[4][4];
                    input_transform(at, c, v);
                    for (int p = 0; p < 16; p++) store16(V + p * place + t * I + c, v[p / 4][p % 4]);
                }
            }
            for (long o = 0; o < O && !lacks; o += COLS) {
                for (int p = 0; p < 16; p++) {
                    Left v = {(uint32_t *)(V + p * place), I / 2, 1};
                    product(tiles, v, U + (p * O + o) * (I / 2), I / 2, M + p * T * COLS, COLS, 0);
                }
                for (long t = 0; t < tiles; t++) {
                    vec Y[2][2][2];
                    for (int half = 0; half < 2; half++) {
                        vec added = bias ? _mm512_loadu_ps(bias + o + 16 * half) : _mm512_setzero_ps();
                        output_transform(M + t * COLS + 16 * half, T * COLS, added, Y[half]);
                    }
                    const uint16_t *at[4];
                    pixels(y, NULL, g, O, first + t, 2, 0, at);
                    for (int k = 0; k < 4; k++)
                        if (at[k]) {
                            __m512bh rounded = _mm512_cvtne2ps_pbh(Y[1][k / 2][k % 2], Y[0][k / 2][k % 2]);
                            _mm512_storeu_si512((void *)(at[k] + o), (__m512i)rounded);
                        }
                }
            }
        }
        free(V), free(zeros), free(M);
    }
    return failed;
}

// dw (O, 3, 3, I) and db (O) of x (N, H, W, I) and dy (N, H, W, O): dU = V D at each place, summed over tiles; their
// order, and with it every bit, is the same for any number of threads. Returns 1 if there was no memory.
int winograd_gradient(const uint16_t *x, const uint16_t *dy, float *dw, float *db, long N, long H, long W, long I,
                      long O, int threads) {
    Grid g = grid_of(N, H, W);
    long pairs = (g.tiles + 1) / 2, K = pairs < DEPTH ? pairs : DEPTH;
    long V_place = K * I + APART, D_place = K * O + APART;
    uint32_t *V = floats(16 * V_place), *D = floats(16 * D_place);  // pairs (16, I / COLS, K, COLS) and (16, K, O)
    float *dU = floats(16 * O * I), *sums = floats(K * O);      // (16, O, I) and (K, O)
    uint16_t *zeros = floats(I + O);
    int failed = !V || !D || !dU || !sums || !zeros;
    if (!failed) {
        memset(zeros, 0, 2 * (I + O));
        memset(db, 0, 4 * O);
#pragma omp parallel num_threads(threads) if (threads > 1)
        for (long first = 0; first < pairs; first += K) {
            long depth = first + K < pairs ? K : pairs - first;
#pragma omp for schedule(static)
            for (long k = 0; k < depth; k++) {
                const uint16_t *x_at[2][16], *dy_at[2][4];
                for (int e = 0; e < 2; e++) {
                    pixels(x, zeros, g, I, 2 * (first + k) + e, 4, 1, x_at[e]);
                    pixels(dy, zeros, g, O, 2 * (first + k) + e, 2, 0, dy_at[e]);
                }
                vec even[4][4], odd[4][4];
                for (long c = 0; c < I; c += 16) {
                    input_transform(x_at[0], c, even);
                    input_transform(x_at[1], c, odd);
                    for (int p = 0; p < 16; p++)
                        store_pairs(V + p * V_place + (c / COLS * K + k) * COLS + c % COLS, even[p / 4][p % 4],
                                    odd[p / 4][p % 4]);
                }
                for (long c = 0; c < O; c += 16) {
                    output_adjoint(dy_at[0], c, even);
                    output_adjoint(dy_at[1], c, odd);
                    for (int p = 0; p < 16; p++)
                        store_pairs(D + p * D_place + k * O + c, even[p / 4][p % 4], odd[p / 4][p % 4]);
                    _mm512_storeu_ps(sums + k * O + c, even[1][1] + odd[1][1]);  // of 2x2 pixels
                }
            }
#pragma omp for collapse(2) schedule(static) nowait
            for (int p = 0; p < 16; p++)
                for (long i = 0; i < I; i += COLS) {
                    Left d = {D + p * D_place, 1, O};
                    product(O, d, V + p * V_place + i * K, depth, dU + p * O * I + i, I, first > 0);
                }
#pragma omp for schedule(static)
            for (long o = 0; o < O; o += 16) {
                vec sum = _mm512_loadu_ps(db + o);
                for (long k = 0; k < depth; k++) sum += _mm512_loadu_ps(sums + k * O + o);
                _mm512_storeu_ps(db + o, sum);
            }
        }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long o = 0; o < O; o++)
            for (long i = 0; i < I; i += 16) filter_adjoint(dU + o * I + i, O * I, I, dw + o * 9 * I + i);
    }
    free(V), free(D), free(dU), free(sums), free(zeros);
    return failed;
}
#endif
