// Group normalisation (Wu & He 2018) of images that lie in memory as (B, pixels, C), with or without SiLU after it, and
// its gradients. float or bfloat16 in and out, float inside. What comes of an image depends on that image alone, whatever
// the batch and the number of threads.
#include <math.h>
#include <stdlib.h>

#include "half.h"

#define EACH _Pragma("omp simd") for (long c = 0; c < C; c++)

enum { PIXELS = 64 };  // are summed in float before they join a sum in double

// 1 / (1 + e^-z). e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor polynomial, which is off by 2e-7 at most.
INLINE float sigmoid(float z) {
    float x = z > 87.f ? -87.f : z < -87.f ? 87.f : -z;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));  // ln(2) in two parts
    float p = fmaf(r, 1.f / 5040, 1.f / 720);
    p = fmaf(p, r, 1.f / 120);
    p = fmaf(p, r, 1.f / 24);
    p = fmaf(p, r, 1.f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.f);
    p = fmaf(p, r, 1.f);
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return 1.f / fmaf(p, power.value, 1.f);
}

// The mean over a group's pixels and channels, for each channel of it.
INLINE void mean_of_group(const double *sums, double *mean, long P, long C, long G) {
    long D = C / G;
    for (long g = 0; g < G; g++) {
        double sum = 0;
        for (long c = g * D; c < (g + 1) * D; c++) sum += sums[c];
        for (long c = g * D; c < (g + 1) * D; c++) mean[c] = sum / ((double)P * D);
    }
}

// sums[c] = sum of x - center over the pixels of channel c, or of its square.
INLINE void sum_of(const void *restrict x, const float *restrict center, double *restrict sums, float *restrict part,
                   long P, long C, int half, int square) {
    EACH sums[c] = 0;
    for (long first = 0; first < P; first += PIXELS) {
        EACH part[c] = 0;
        for (long p = first; p < P && p < first + PIXELS; p++) {
            EACH {
                float v = load(x, p * C + c, half) - center[c];
                part[c] += square ? v * v : v;
            }
        }
        EACH sums[c] += part[c];
    }
}

INLINE void forward(const void *restrict x, void *restrict y, const float *restrict weight, const float *restrict bias,
                    float *restrict mean, float *restrict rstd, long P, long C, long G, double eps, float *restrict f,
                    double *restrict d, int half, int silu) {
    float *restrict center = f, *restrict scale = f + C, *restrict part = f + 2 * C;
    double *restrict sums = d, *restrict means = d + C;
    long D = C / G;
    EACH center[c] = 0;
    sum_of(x, center, sums, part, P, C, half, 0);
    mean_of_group(sums, means, P, C, G);
    EACH center[c] = means[c];
    sum_of(x, center, sums, part, P, C, half, 1);
    mean_of_group(sums, means, P, C, G);
    for (long g = 0; g < G; g++) mean[g] = center[g * D], rstd[g] = 1 / sqrt(means[g * D] + eps);
    for (long c = 0; c < C; c++) scale[c] = weight[c] * rstd[c / D];
    for (long p = 0; p < P; p++) {
        EACH {
            float z = fmaf(load(x, p * C + c, half) - center[c], scale[c], bias[c]);
            store(y, p * C + c, silu ? z * sigmoid(z) : z, half);
        }
    }
}

// With z = weight (x - mean) rstd + bias and dz the gradient of it, and with means over a group,
//   dx = rstd (weight dz - mean(weight dz) - (x - mean) rstd mean(weight dz (x - mean) rstd)).
INLINE void backward(const void *restrict x, const void *restrict dy, void *restrict dx, const float *restrict weight,
                     const float *restrict bias, const float *restrict mean, const float *restrict rstd,
                     float *restrict dweight, float *restrict dbias, long P, long C, long G, float *restrict f,
                     double *restrict d, int half, int silu) {
    float *restrict center = f, *restrict scale = f + C, *restrict slope = f + 2 * C, *restrict shift = f + 3 * C;
    float *restrict part_w = f + 4 * C, *restrict part_b = f + 5 * C, *restrict dz = f + 6 * C;
    double *restrict sum_w = d, *restrict sum_b = d + C, *restrict mean_w = d + 2 * C, *restrict mean_b = d + 3 * C;
    long D = C / G;
    for (long c = 0; c < C; c++) {
        center[c] = mean[c / D];
        scale[c] = weight[c] * rstd[c / D];
        sum_w[c] = sum_b[c] = 0;
    }
    for (long first = 0; first < P; first += PIXELS) {
        EACH part_w[c] = part_b[c] = 0;
        for (long p = first; p < P && p < first + PIXELS; p++) {
            EACH {
                float v = load(x, p * C + c, half) - center[c];
                float g = load(dy, p * C + c, half);
                if (silu) {
                    float z = fmaf(v, scale[c], bias[c]), s = sigmoid(z);
                    g *= s * fmaf(z, 1.f - s, 1.f);
                    dz[p * C + c] = g;
                }
                part_w[c] += g * v;
                part_b[c] += g;
            }
        }
        EACH sum_w[c] += part_w[c], sum_b[c] += part_b[c];
    }
    for (long c = 0; c < C; c++) {
        dweight[c] = sum_w[c] *= rstd[c / D];
        dbias[c] = sum_b[c];
        sum_w[c] *= weight[c];
        sum_b[c] *= weight[c];
    }
    mean_of_group(sum_w, mean_w, P, C, G);
    mean_of_group(sum_b, mean_b, P, C, G);
    for (long c = 0; c < C; c++) {
        slope[c] = -rstd[c / D] * rstd[c / D] * mean_w[c];
        shift[c] = -rstd[c / D] * mean_b[c];
    }
    for (long p = 0; p < P; p++) {
        EACH {
            float g = silu ? dz[p * C + c] : load(dy, p * C + c, half);
            float v = load(x, p * C + c, half) - center[c];
            store(dx, p * C + c, fmaf(g, scale[c], fmaf(v, slope[c], shift[c])), half);
        }
    }
}

#define AT(x, i) ((const char *)(x) + (i) * (half ? 2 : 4))
#define CHOOSE(function, ...)                                                                       \
    if (half && silu) function(__VA_ARGS__, 1, 1);                                                  \
    else if (half) function(__VA_ARGS__, 1, 0);                                                     \
    else if (silu) function(__VA_ARGS__, 0, 1);                                                     \
    else function(__VA_ARGS__, 0, 0)

// mean and rstd are (B, G). Returns 0, or 1 when there is no memory.
int group_norm_forward(const void *x, void *y, const float *weight, const float *bias, float *mean, float *rstd, long B,
                       long P, long C, long G, double eps, int half, int silu, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *f = malloc(3 * C * sizeof *f);
        double *d = malloc(2 * C * sizeof *d);
        if (!f || !d) failed = 1;
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++)
            if (f && d) {
                CHOOSE(forward, AT(x, b * P * C), (void *)AT(y, b * P * C), weight, bias, mean + b * G, rstd + b * G, P,
                       C, G, eps, f, d);
            }
        free(f);
        free(d);
    }
    return failed;
}

// dweight and dbias are (B, C), still to be summed over images. Returns 0, or 1 when there is no memory.
int group_norm_backward(const void *x, const void *dy, void *dx, const float *weight, const float *bias,
                        const float *mean, const float *rstd, float *dweight, float *dbias, long B, long P, long C,
                        long G, int half, int silu, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *f = malloc((6 + (silu ? P : 0)) * C * sizeof *f);
        double *d = malloc(4 * C * sizeof *d);
        if (!f || !d) failed = 1;
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++)
            if (f && d) {
                CHOOSE(backward, AT(x, b * P * C), AT(dy, b * P * C), (void *)AT(dx, b * P * C), weight, bias,
                       mean + b * G, rstd + b * G, dweight + b * C, dbias + b * C, P, C, G, f, d);
            }
        free(f);
        free(d);
    }
    return failed;
}
