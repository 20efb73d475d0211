// y += s (Q x) in place, for the tokens of a batch whose adapter has a resident update.
//
// Q holds D = W' - W of one linear, in 8 bits with one scale a row or in float32 with scales of 1.
// The tokens are grouped by update, so that each one that is asked for is read from memory once,
// and widened on the way: in registers where few tokens want it, else a few rows at a time into the
// first cache. A batch without such tokens costs one look at the slots. Registered as the torch op
// secura::delta_, through torch's stable C interface alone, and run on torch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "half_precision.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define DOT 1
#else
#define DOT 0
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int WIDE = 32;            // rows of Q are padded to a multiple of this
constexpr int HIGH = 8;             // rows at a time
constexpr int FEW = 4;              // tokens for which Q is widened in registers
constexpr int64_t GRAIN = 1 << 19;  // multiplications that are worth a thread

// Vectors that any compiler splits into those of the processor.
typedef float Floats __attribute__((vector_size(64)));
constexpr int LANES = 16;

template <class V> inline V load(const void *from)
{
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
inline Floats floats(const float *from) { return load<Floats>(from); }
inline Floats floats(const int8_t *from)
{
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    // Not __builtin_convertvector: gcc 12 makes it number by number.
    float v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = from[i];
    return load<Floats>(v);
#endif
}

inline float sum(Floats v)
{
    float all = 0;
    for (int i = 0; i < LANES; i++) all += v[i];
    return all;
}

// to[r][t] = Q[r] . x[t] for R rows and T tokens.
template <int R, int T, class Q>
void dots(float (*to)[T], const Q *rows, int64_t apart, const float *x, int64_t in)
{
    Floats all[R][T] = {};
    for (int64_t k = 0; k < in; k += LANES) {
        Floats q[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) q[r] = floats(rows + r * apart + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            Floats v = floats(x + t * in + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) all[r][t] += q[r] * v;
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) to[r][t] = sum(all[r][t]);
}

inline void widen(float *to, const int8_t *from, int64_t count)
{
    for (int64_t k = 0; k < count; k += LANES) {
        Floats v = floats(from + k);
        __builtin_memcpy(to + k, &v, sizeof v);
    }
}

#if DOT
// The same with the processor's dot product of bfloat16, which holds every 8-bit integer exactly
// and adds up in float32.
inline __m512bh halves(const BF16 *from) { return (__m512bh)_mm512_loadu_si512(from); }
inline __m512bh halves(const int8_t *from)
{
    return _mm512_cvtne2ps_pbh((__m512)floats(from + LANES), (__m512)floats(from));
}

template <int R, int T, class Q>
void dots(float (*to)[T], const Q *rows, int64_t apart, const BF16 *x, int64_t in)
{
    __m512 all[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) all[r][t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += WIDE) {
        __m512bh q[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) q[r] = halves(rows + r * apart + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            __m512bh v = halves(x + t * in + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) all[r][t] = _mm512_dpbf16_ps(all[r][t], q[r], v);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) to[r][t] = _mm512_reduce_add_ps(all[r][t]);
}

inline void widen(BF16 *to, const int8_t *from, int64_t count)
{
    for (int64_t k = 0; k < count; k += WIDE)
        _mm512_storeu_si512(to + k, (__m512i)halves(from + k));
}
#endif

// What the products are made of: bfloat16 where the processor multiplies it and Q is exact in it.
template <class Y, class Q>
using Factor = std::conditional_t<DOT && std::is_same_v<Y, BF16> && std::is_same_v<Q, int8_t>, BF16, float>;

inline void copy(float *to, BF16 x) { *to = wide(x); }
inline void copy(float *to, F16 x) { *to = wide(x); }
inline void copy(float *to, float x) { *to = x; }
inline void copy(BF16 *to, BF16 x) { *to = x; }

// The rows of one slice of one update, and the tokens that want them.
template <class Y, class Q> struct Work {
    using X = Factor<Y, Q>;
    Y *y;                    // at the slice's first column
    int64_t across;          // distance between rows of y
    const int64_t *tokens;
    const X *x;              // (count, in), padded
    int64_t count, in;
    const Q *weight;         // (rows, in)
    const float *scale;      // (rows)

    template <int R, int T, class P>
    void put(const P *rows, int64_t row, int64_t first) const
    {
        float h[R][T];
        dots<R, T>(h, rows, in, x + first * in, in);
        for (int t = 0; t < T; t++) {
            Y *to = y + tokens[first + t] * across + row;
            for (int r = 0; r < R; r++) narrow(to[r], wide(to[r]) + scale[row + r] * h[r][t]);
        }
    }

    template <int R, class P> void rows(const P *from, int64_t row) const
    {
        int64_t t = 0;
        // 8 rows of 3 tokens and what they are made of fit into 32 registers, so do 4 of 4.
        if constexpr (R == HIGH)
            for (; t + 3 <= count; t += 3) put<R, 3>(from, row, t);
        else
            for (; t + FEW <= count; t += FEW) put<R, FEW>(from, row, t);
        for (; t + 2 <= count; t += 2) put<R, 2>(from, row, t);
        for (; t < count; t++) put<R, 1>(from, row, t);
    }

    void run(int64_t first, int64_t last) const
    {
        int64_t row = first;
        if constexpr (std::is_same_v<Q, int8_t>)
            if (count > FEW) {
                thread_local std::vector<X> space;
                space.resize(HIGH * in);
                for (; row + HIGH <= last; row += HIGH) {
                    widen(space.data(), weight + row * in, HIGH * in);
                    rows<HIGH>(space.data(), row);
                }
            }
        for (; row + 4 <= last; row += 4) rows<4>(weight + row * in, row);
        for (; row < last; row++) rows<1>(weight + row * in, row);
    }
};

template <class Y, class Q>
void step(const Tensor &y, const Tensor &x, const Tensor &slots, const Tensor &places,
          const Tensor &weight, const Tensor &scale, const Tensor &segments, const Tensor &used)
{
    using X = Factor<Y, Q>;
    const int64_t count = y.size(0), last = places.size(0) - 1, in = weight.size(2);
    const auto *slot = static_cast<const int64_t *>(slots.data_ptr());
    const auto *place = static_cast<const int32_t *>(places.data_ptr());
    std::vector<std::vector<int64_t>> groups(weight.size(0));
    bool any = false;
    for (int64_t t = 0; t < count; t++) {
        int32_t at = place[slot[t] < 0 ? last : slot[t]];
        if (at < 0) continue;
        groups[at].push_back(t);
        any = true;
    }
    if (!any) return;
    const auto *from = static_cast<const Y *>(x.data_ptr());
    const auto *segment = static_cast<const int64_t *>(segments.data_ptr());
    const auto *changes = static_cast<const uint8_t *>(used.data_ptr());
    const int64_t slices = segments.size(0), rows = weight.size(1), width = x.size(1);
    std::vector<X> inputs;
    for (size_t k = 0; k < groups.size(); k++) {
        const auto &tokens = groups[k];
        const int64_t wanted = int64_t(tokens.size());
        if (!wanted) continue;
        inputs.resize(wanted * in);
        torch::stable::parallel_for(
            0, wanted, std::max<int64_t>(1, GRAIN / 8 / in), [&](int64_t first, int64_t end) {
                for (int64_t t = first; t < end; t++) {
                    const Y *row = from + tokens[t] * x.stride(0);
                    X *to = &inputs[t * in];
                    for (int64_t j = 0; j < width; j++) copy(to + j, row[j]);
                    std::fill(to + width, to + in, X{});
                }
            });
        for (int64_t s = 0; s < slices; s++) {
            if (!changes[k * slices + s]) continue;
            const int64_t column = segment[3 * s], row = segment[3 * s + 1], size = segment[3 * s + 2];
            Work<Y, Q> work{static_cast<Y *>(y.data_ptr()) + column,
                            y.stride(0),
                            tokens.data(),
                            inputs.data(),
                            wanted,
                            in,
                            static_cast<const Q *>(weight.data_ptr()) + (k * rows + row) * in,
                            static_cast<const float *>(scale.data_ptr()) + k * rows + row};
            const int64_t blocks = (size + HIGH - 1) / HIGH;
            torch::stable::parallel_for(
                0, blocks, std::max<int64_t>(1, GRAIN / (HIGH * in * wanted)),
                [&](int64_t first, int64_t end) {
                    work.run(first * HIGH, std::min(size, end * HIGH));
                });
        }
    }
}

template <class Y, class... Tensors> void by_weight(const Tensor &weight, const Tensors &...rest)
{
    switch (weight.scalar_type()) {
    case ScalarType::Char: return step<Y, int8_t>(rest...);
    case ScalarType::Float: return step<Y, float>(rest...);
    default: STD_TORCH_CHECK(false, "secura::delta_: an update must be int8 or float32");
    }
}

void any_step(Tensor y, Tensor x, Tensor slots, Tensor places, Tensor weight, Tensor scale,
              Tensor segments, Tensor used)
{
    auto run = [&](auto kind) {
        by_weight<decltype(kind)>(weight, y, x, slots, places, weight, scale, segments, used);
    };
    switch (y.scalar_type()) {
    case ScalarType::BFloat16: return run(BF16{});
    case ScalarType::Half: return run(F16{});
    case ScalarType::Float: return run(float{});
    default: STD_TORCH_CHECK(false, "secura::delta_: dtype must be bfloat16, float16 or float32");
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secura, m)
{
    m.def("delta_(Tensor(a!) y, Tensor x, Tensor slots, Tensor places, Tensor weight, Tensor scale, "
          "Tensor segments, Tensor used) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(secura, CPU, m) { m.impl("delta_", TORCH_BOX(&any_step)); }
