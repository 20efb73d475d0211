/* W' = S-MagNorm(W, D), rounded once, and what changed: the arithmetic of magnorm.py in one pass.

A strip of elements at a time, whose float32 copies never leave the first caches. Compiled without
contraction and without -ffast-math: `none` gives the bits of torch's W + D, the other modes differ
from torch where the last bit of exp() shows. The loops are written for the compiler to vectorise.
*/
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Without it every fmaf() below would be a call: torch is faster then. */
#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "no fused multiply-add"
#endif

enum kind { BF16, F16, F32 };
enum mode { NONE, PUBLISHED, BOUNDED };
enum { STRIP = 2048 };

static inline uint32_t bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float number(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

static inline uint16_t to_bf16(float x)
{
    uint32_t u = bits(x);
    return x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

/* By hand: compilers do not vectorise conversions of _Float16 everywhere. */
static inline float from_f16(uint16_t h)
{
    uint32_t u = (uint32_t)(h & 0x7fff) << 13;
    uint32_t wide = bits(number(u) * 0x1p112f);           /* moves the exponent's bias */
    return number((u >= 0x0f800000 ? u | 0x7f800000 : wide) | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t to_f16(float x)
{
    uint32_t u = bits(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    uint32_t small = bits(number(u) + 0.5f) - 0x3f000000; /* the addition rounds a subnormal */
    uint32_t normal = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
    uint32_t h = u < 0x38800000 ? small : normal;
    h = u >= 0x477ff000 ? 0x7c00 : h;                     /* 65520 and more: infinity */
    return sign | (u > 0x7f800000 ? 0x7e00 : h);
}

static void widen(float *restrict to, const void *restrict from, enum kind kind, int n)
{
    const uint16_t *half = from;
    if (kind == BF16)
        for (int i = 0; i < n; i++) to[i] = number((uint32_t)half[i] << 16);
    else if (kind == F16)
        for (int i = 0; i < n; i++) to[i] = from_f16(half[i]);
    else
        memcpy(to, from, n * sizeof *to);
}

static void narrow(void *restrict to, const float *restrict from, enum kind kind, int n)
{
    uint16_t *half = to;
    if (kind == BF16)
        for (int i = 0; i < n; i++) half[i] = to_bf16(from[i]);
    else if (kind == F16)
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
    return 1 / (1 + p * number((bits(shifted) << 23) + 0x3f800000));
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

/* sums: |W|^2, |W'-W|^2, |W'32-W|^2, |W'-W'32|^2 and max |W'-W|/|W|, as in stream.py. */
static void weigh(double *sums, const float *restrict W, const float *restrict made,
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

/* out = W' of n elements; a is tau or scale, b is eps. Adds to the five numbers in sums. */
void secura_fold(void *restrict out, int out_kind, const void *restrict W, int kind,
                 const float *restrict D, int64_t n, int mode, float a, float b, float peak,
                 double *restrict sums)
{
    static const int size[] = {2, 2, 4};
    float w[STRIP], made[STRIP], written[STRIP];
    for (int64_t at = 0; at < n; at += STRIP) {
        int count = n - at < STRIP ? n - at : STRIP;
        char *place = (char *)out + at * size[out_kind];
        /* The next strip comes from memory meanwhile; processors stop at each page by themselves. */
        for (int i = 0; i < STRIP * size[kind]; i += 64)
            __builtin_prefetch((const char *)W + (at + STRIP) * size[kind] + i);
        widen(w, (const char *)W + at * size[kind], kind, count);
        if (mode == PUBLISHED)
            published(made, w, D + at, a, b, peak, count);
        else if (mode == BOUNDED)
            bounded(made, w, D + at, a, count);
        else
            for (int i = 0; i < count; i++) made[i] = w[i] + D[at + i];
        narrow(place, made, out_kind, count);
        widen(written, place, out_kind, count);
        weigh(sums, w, made, written, count);
    }
}
