/* float32 from and to bfloat16 and float16, rounded to nearest even; for C and for C++.

By hand, because compilers do not vectorise conversions of _Float16 everywhere. NaN stays NaN.
*/
#ifndef SECURA_HALF_PRECISION_H
#define SECURA_HALF_PRECISION_H

#include <stdint.h>
#include <string.h>

static inline uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

static inline float from_bf16(uint16_t h) { return bits_float((uint32_t)h << 16); }

static inline uint16_t to_bf16(float x)
{
    uint32_t u = float_bits(x);
    return (uint16_t)(x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float from_f16(uint16_t h)
{
    uint32_t u = (uint32_t)(h & 0x7fff) << 13;
    uint32_t wide = float_bits(bits_float(u) * 0x1p112f); /* moves the exponent's bias */
    return bits_float((u >= 0x0f800000 ? u | 0x7f800000 : wide) | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t to_f16(float x)
{
    uint32_t u = float_bits(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    uint32_t small = float_bits(bits_float(u) + 0.5f) - 0x3f000000; /* + rounds a subnormal */
    uint32_t normal = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
    uint32_t h = u < 0x38800000 ? small : normal;
    h = u >= 0x477ff000 ? 0x7c00 : h;                     /* 65520 and more: infinity */
    return (uint16_t)(sign | (u > 0x7f800000 ? 0x7e00 : h));
}

#ifdef __cplusplus
struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

inline float wide(float x) { return x; }
inline float wide(BF16 x) { return from_bf16(x.bits); }
inline float wide(F16 x) { return from_f16(x.bits); }
inline void narrow(float &to, float x) { to = x; }
inline void narrow(BF16 &to, float x) { to.bits = to_bf16(x); }
inline void narrow(F16 &to, float x) { to.bits = to_f16(x); }
#endif

#endif
