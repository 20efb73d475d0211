/* W' = S-MagNorm(W, D), rounded once, and what changed: the arithmetic of ../modes in one pass.

A strip of elements at a time, whose float32 copies never leave the first caches; nor does D where
it is made here, as a product of two thin matrices. Compiled without contraction and without
-ffast-math: `none` gives the bits of torch's W + D, the other modes differ from torch where the
last bit of exp() shows. The loops are written for the compiler to vectorise.
*/
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half_precision.h"

/* Without it every fmaf() below would be a call: torch is faster then. */
#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "no fused multiply-add"
#endif

enum dtype { BF16, F16, F32 };
/* As FORMS in binding.py. */
enum mode { NONE, PUBLISHED, BOUNDED, PRODUCT };
enum { STRIP = 2048 };
static const int size[] = {2, 2, 4};

/* A tile of the product is HIGH rows of WIDE numbers: as many as there are registers for. */
#if defined(__AVX512F__)
enum { HIGH = 14, WIDE = 32 };
#elif defined(__AVX2__)
enum { HIGH = 6, WIDE = 16 };
#else
enum { HIGH = 12, WIDE = 8 };
#endif
/* DEEP x SPAN numbers of R stay in the second cache for TALL rows, HIGH x SPAN of D in the first. */
enum { DEEP = 256, SPAN = 512, TALL = 16 * HIGH };

static void widen(float *restrict to, const void *restrict from, enum dtype dtype, int n)
{
    const uint16_t *half = from;
    if (dtype == BF16)
        for (int i = 0; i < n; i++) to[i] = from_bf16(half[i]);
    else if (dtype == F16)
        for (int i = 0; i < n; i++) to[i] = from_f16(half[i]);
    else
        memcpy(to, from, n * sizeof *to);
}

static void narrow(void *restrict to, const float *restrict from, enum dtype dtype, int n)
{
    uint16_t *half = to;
    if (dtype == BF16)
        for (int i = 0; i < n; i++) half[i] = to_bf16(from[i]);
    else if (dtype == F16)
        for (int i = 0; i < n; i++) half[i] = to_f16(from[i]);
    else
        memcpy(to, from, n * sizeof *from);
}

/* 1 / (1 + exp(-x)): exp to 1 ulp by Cody and Waite's reduction and a Taylor polynomial. */
static inline float sigmoid(float x)
{
    float y = -x;
    y = -30 > y ? -30 : y;                                /* beyond: 0 or 1 for every caller, */
    y = 30 < y ? 30 : y;                                  /* and subnormal numbers are slow */
    float shifted = fmaf(y, 0x1.715476p+0f, 0x1.8p23f);   /* rounds y / ln 2 to an integer k */
    float k = shifted - 0x1.8p23f;
    float r = fmaf(k, -0x1.62e4p-1f, y);
    r = fmaf(k, -0x1.7f7d1cp-20f, r);
    float p = 1.0f / 5040;
    p = fmaf(p, r, 1.0f / 720);
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1;
    return 1 / (1 + p * bits_float((float_bits(shifted) << 23) + 0x3f800000));
}

static void published(float *restrict to, const float *restrict W, const float *restrict D,
                      float scale, float eps, float peak, int n)
{
    for (int i = 0; i < n; i++) {
        float rho = fabsf(D[i]) / (fabsf(W[i]) + eps);
        float res = 2 - sigmoid(scale * (rho / peak - 0.5f));
        to[i] = peak > 0 ? (2 * W[i] + D[i]) / res : W[i];
    }
}

static void bounded(float *restrict to, const float *restrict W, const float *restrict D,
                    float tau, int n)
{
    for (int i = 0; i < n; i++) {
        float reach = tau * fabsf(W[i]);
        float moved = W[i] + reach * (2 * sigmoid(2 * (D[i] / reach)) - 1);
        to[i] = reach >= FLT_MIN ? moved : W[i];
    }
}

/* sums: |W|^2, |W'-W|^2, |W'32-W|^2, |W'-W'32|^2 and max |W'-W|/|W|, the fields of FoldStats. */
static void measure_change(double *sums, const float *restrict W, const float *restrict made,
                           const float *restrict written, int n)
{
    double base = 0, moved = 0, update = 0, lost = 0;
    float top = 0;
#pragma omp simd reduction(+ : base, moved, update, lost) reduction(max : top)
    for (int i = 0; i < n; i++) {
        double w = W[i], m = written[i] - W[i], u = made[i] - W[i], l = written[i] - made[i];
        base = fma(w, w, base);
        moved = fma(m, m, moved);
        update = fma(u, u, update);
        lost = fma(l, l, lost);
        float share = W[i] == 0 ? 0 : fabsf(written[i] - W[i]) / fabsf(W[i]);
        top = share > top ? share : top;
    }
    sums[0] += base;
    sums[1] += moved;
    sums[2] += update;
    sums[3] += lost;
    sums[4] = top > sums[4] ? top : sums[4];
}

/* One strip; a is tau or scale, b is eps. Adds to the five numbers in sums. */
static void fold(void *restrict out, enum dtype out_dtype, const void *restrict W, enum dtype dtype,
                 const float *restrict D, int n, enum mode mode, float a, float b, float peak,
                 double *restrict sums)
{
    float w[STRIP], made[STRIP], written[STRIP];
    widen(w, W, dtype, n);
    if (mode == PUBLISHED)
        published(made, w, D, a, b, peak, n);
    else if (mode == BOUNDED)
        bounded(made, w, D, a, n);
    else
        for (int i = 0; i < n; i++) made[i] = w[i] + D[i];
    narrow(out, made, out_dtype, n);
    widen(written, out, out_dtype, n);
    measure_change(sums, w, made, written, n);
}

/* What comes next comes from memory meanwhile; processors stop at each page by themselves. */
static void prefetch(const char *from, int bytes)
{
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

static void prefetch_to_write(char *to, int bytes)
{
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(to + i, 1);
}

/* out = W' of n elements. */
void secura_fold(void *restrict out, int out_dtype, const void *restrict W, int dtype,
                 const float *restrict D, int64_t n, int mode, float a, float b, float peak,
                 double *restrict sums)
{
    for (int64_t at = 0; at < n; at += STRIP) {
        const char *from = (const char *)W + at * size[dtype];
        prefetch(from + STRIP * size[dtype], STRIP * size[dtype]);
        fold((char *)out + at * size[out_dtype], out_dtype, from, dtype, D + at,
             n - at < STRIP ? n - at : STRIP, mode, a, b, peak, sums);
    }
}

/* One tile of D += L R. A number of D is one sum, k in order, each step rounded once. */
static void tile(float (*restrict D)[SPAN], const float (*restrict L)[DEEP],
                 const float *restrict R, int64_t across, int K)
{
    float sum[HIGH][WIDE];
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < WIDE; j++) sum[i][j] = D[i][j];
    for (int k = 0; k < K; k++)
#pragma GCC unroll 16
        for (int i = 0; i < HIGH; i++)
#pragma omp simd
            for (int j = 0; j < WIDE; j++)
                sum[i][j] = fmaf(L[i][k], R[k * across + j], sum[i][j]);
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < WIDE; j++) D[i][j] = sum[i][j];
}

/* D = L R for up to HIGH rows and SPAN columns; beyond those of L and R it has anything. */
static void product(float (*restrict D)[SPAN], const float *restrict L, int high,
                    const float *restrict R, int64_t across, int count, int64_t K)
{
    static const float none[DEEP];
    float left[HIGH][DEEP], edge[DEEP][WIDE];
    memset(D, 0, HIGH * sizeof *D);
    for (int64_t k = 0; k < K; k += DEEP) {
        int deep = K - k < DEEP ? K - k : DEEP, whole = count / WIDE * WIDE;
        for (int i = 0; i < HIGH; i++)
            memcpy(left[i], i < high ? L + i * K + k : none, deep * sizeof(float));
        const float *right = R + k * across;
        for (int j = 0; j < whole; j += WIDE)
            tile((void *)&D[0][j], left, right + j, across, deep);
        if (whole < count) {
            for (int i = 0; i < deep; i++)
                memcpy(edge[i], right + i * across + whole, (count - whole) * sizeof(float));
            tile((void *)&D[0][whole], left, edge[0], WIDE, deep);
        }
    }
}

/* out (rows x cols) = W' for D = L R, L (rows x K) and R (K x cols); D itself where mode says so,
   then without W and sums. */
void secura_fold_product(void *restrict out, int out_dtype, const void *restrict W, int dtype,
                         const float *restrict L, const float *restrict R, int64_t rows,
                         int64_t cols, int64_t K, int mode, float a, float b, float peak,
                         double *restrict sums)
{
    float D[HIGH][SPAN];
    for (int64_t top = 0; top < rows; top += TALL)
        for (int64_t left = 0; left < cols; left += SPAN)
            for (int64_t row = top; row < rows && row < top + TALL; row += HIGH) {
                int high = rows - row < HIGH ? rows - row : HIGH;
                int count = cols - left < SPAN ? cols - left : SPAN;
                product(D, L + row * K, high, R + left, cols, count, K);
                for (int i = 0; i < high; i++) {
                    int64_t at = (row + i) * cols + left;
                    char *to = (char *)out + at * size[out_dtype];
                    const char *from = (const char *)W + at * size[dtype];
                    if (mode == PRODUCT) {
                        memcpy(to, D[i], count * sizeof(float));
                        continue;
                    }
                    prefetch(from + cols * size[dtype], count * size[dtype]);
                    prefetch_to_write(to + cols * size[out_dtype], count * size[out_dtype]);
                    fold(to, out_dtype, from, dtype, D[i], count, mode, a, b, peak, sums);
                }
            }
}
