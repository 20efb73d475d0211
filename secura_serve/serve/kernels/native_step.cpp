// y += C (U_slot (y - b)[rows]) in place, for a batch in which every token has its own slot.
//
// One call per base linear, and no memory traffic but y, C and the U's that are asked for: the
// entries are gathered, multiplied and expanded for a few tokens at a time, in registers and the
// first cache. A token without an adapter (slot -1) costs a comparison, a narrow adapter only its
// own rank. Registered as the torch op secura::step_, through torch's stable C interface alone, and
// run on torch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "half_precision.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define DOT 1
#else
#define DOT 0
#endif

// How many numbers of the contracted index lie side by side in the bank and in C, for bfloat16.
extern "C" int secura_step_pairs() { return DOT ? 2 : 1; }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int LANES = 16;      // the bank's output index is padded to this
constexpr int BLOCK = 8;       // tokens at a time
constexpr int STRIP = 256;     // columns at a time where there is no dot product of bfloat16
constexpr int64_t GRAIN = 1 << 18;  // multiplications that are worth a thread

template <class T> struct Step {
    T *y;
    const T *source;        // what the entries are gathered from: y, or their sum over ranks
    const int64_t *slots;
    const int32_t *rows;    // (n, r), -1 where a slice has fewer
    const T *bank;          // (slots + 1, n, r / P, lanes, P), P pairs in bfloat16
    const int32_t *ranks;   // (slots + 1): the highest index in use, plus one
    const T *C;             // (r / P, out, P)
    const T *offset;        // (n, r) or null
    const int64_t *starts;  // (n + 1): where each slice's columns begin
    int64_t across, out;    // of y: distance between rows, columns
    int64_t stride;         // of source
    int64_t apart;          // of the bank: distance between slots
    int n, r, lanes;

    const T *core(int64_t slot, int s) const { return bank + slot * apart + int64_t(s) * r * lanes; }

    float entry(const T *row, int s, int k) const
    {
        int at = rows[s * r + k];
        if (at < 0) return 0;
        return wide(row[at]) - (offset ? wide(offset[s * r + k]) : 0);
    }

    // Of an adapter on this linear: it may be wider elsewhere.
    int rank(int64_t slot) const { return slot < 0 ? 0 : std::min(r, int(ranks[slot])); }

    int rank(int64_t first, int count) const
    {
        int top = 0;
        for (int t = 0; t < count; t++) top = std::max(top, rank(slots[first + t]));
        return top;
    }

    void run(int64_t first, int64_t last) const;
};

template <class T> void Step<T>::run(int64_t first, int64_t last) const
{
    thread_local std::vector<float> space;
    space.resize(BLOCK * n * lanes);
    for (; first < last; first += BLOCK) {
        int count = int(std::min<int64_t>(BLOCK, last - first)), K = rank(first, count);
        if (!K) continue;
        std::fill(space.begin(), space.end(), 0.f);
        for (int t = 0; t < count; t++) {
            int64_t slot = slots[first + t];
            for (int s = 0; slot >= 0 && s < n; s++) {
                const T *U = core(slot, s);
                float *h = &space[(t * n + s) * lanes];
                for (int k = 0; k < rank(slot); k++) {
                    float g = entry(source + (first + t) * stride, s, k);
                    for (int i = 0; i < lanes; i++) h[i] += g * wide(U[k * lanes + i]);
                }
            }
        }
        for (int s = 0; s < n; s++)
            for (int64_t from = starts[s]; from < starts[s + 1]; from += STRIP) {
                int size = int(std::min<int64_t>(STRIP, starts[s + 1] - from));
                float sum[BLOCK][STRIP], c[STRIP];
                for (int t = 0; t < count; t++)
                    for (int j = 0; j < size; j++) sum[t][j] = wide(y[(first + t) * across + from + j]);
                for (int k = 0; k < K; k++) {
                    for (int j = 0; j < size; j++) c[j] = wide(C[k * out + from + j]);
                    for (int t = 0; t < count; t++) {
                        float h = space[(t * n + s) * lanes + k];
                        for (int j = 0; j < size; j++) sum[t][j] += h * c[j];
                    }
                }
                for (int t = 0; t < count; t++) {
                    if (slots[first + t] < 0) continue;
                    for (int j = 0; j < size; j++) narrow(y[(first + t) * across + from + j], sum[t][j]);
                }
            }
    }
}

#if DOT
// The same with the processor's dot product of bfloat16 pairs, which adds up in float32.
inline __m512bh pairs(const void *p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh pair(const void *p)
{
    int32_t two;
    std::memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

template <int T>
void expand(BF16 *y, int64_t across, const BF16 *h, int64_t apart, const BF16 *C, int64_t out,
            int K, int64_t columns)
{
    for (int64_t j = 0; j < columns; j += 2 * LANES) {
        int64_t left = columns - j;
        __mmask16 low = left >= LANES ? 0xffff : (1u << left) - 1;
        __mmask16 high = left >= 2 * LANES ? 0xffff : left > LANES ? (1u << (left - LANES)) - 1 : 0;
        __m512 sum[T][2];
        for (int t = 0; t < T; t++) {
            const BF16 *from = y + t * across + j;
            // The next tokens' columns come meanwhile: measured at three times the speed for a
            // batch that is larger than the caches.
            _mm_prefetch((const char *)(from + T * across), _MM_HINT_T1);
            sum[t][0] = (__m512)_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, from)), 16);
            sum[t][1] = (__m512)_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, from + LANES)), 16);
        }
        const BF16 *c = C + 2 * j;
        for (int k = 0; k < K; k += 2, c += 2 * out) {
            __m512bh a = (__m512bh)_mm512_maskz_loadu_epi32(low, c);
            __m512bh b = (__m512bh)_mm512_maskz_loadu_epi32(high, c + 2 * LANES);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                __m512bh two = pair(h + t * apart + k);
                sum[t][0] = _mm512_dpbf16_ps(sum[t][0], a, two);
                sum[t][1] = _mm512_dpbf16_ps(sum[t][1], b, two);
            }
        }
        for (int t = 0; t < T; t++) {
            BF16 *to = y + t * across + j;
            _mm256_mask_storeu_epi16(to, low, (__m256i)_mm512_cvtneps_pbh(sum[t][0]));
            _mm256_mask_storeu_epi16(to + LANES, high, (__m256i)_mm512_cvtneps_pbh(sum[t][1]));
        }
    }
}

template <> void Step<BF16>::run(int64_t first, int64_t last) const
{
    thread_local std::vector<BF16> space;
    space.resize((BLOCK * n + 1) * lanes);
    BF16 *g = &space[BLOCK * n * lanes];
    int64_t high = n * lanes;
    for (; first < last; first += BLOCK) {
        int count = int(std::min<int64_t>(BLOCK, last - first)), K = rank(first, count);
        if (!K) continue;
        for (int t = 0; t < count; t++) {
            int64_t slot = slots[first + t];
            BF16 *h = &space[t * high];
            if (slot < 0) {
                std::fill(h, h + high, BF16{0});
                continue;
            }
            for (int s = 0; s < n; s++, h += lanes) {
                int R = (rank(slot) + 1) & ~1;
                for (int k = 0; k < R; k++) narrow(g[k], entry(source + (first + t) * stride, s, k));
                const BF16 *U = core(slot, s);
                for (int i = 0; i < lanes; i += LANES) {
                    __m512 sum = _mm512_setzero_ps();
                    for (int k = 0; k < R; k += 2)
                        sum = _mm512_dpbf16_ps(sum, pairs(U + k * lanes + 2 * i), pair(g + k));
                    _mm256_storeu_si256((__m256i *)(h + i), (__m256i)_mm512_cvtneps_pbh(sum));
                }
            }
        }
        K = (K + 1) & ~1;
        for (int s = 0; s < n; s++) {
            BF16 *to = y + first * across + starts[s];
            const BF16 *h = &space[s * lanes], *c = C + 2 * starts[s];
            int64_t columns = starts[s + 1] - starts[s];
            int t = 0;
            for (; t + BLOCK <= count; t += BLOCK)
                expand<BLOCK>(to + t * across, across, h + t * high, high, c, out, K, columns);
            for (; t + 4 <= count; t += 4)
                expand<4>(to + t * across, across, h + t * high, high, c, out, K, columns);
            for (; t < count; t++)
                expand<1>(to + t * across, across, h + t * high, high, c, out, K, columns);
        }
    }
}
#endif

template <class T>
void step(const Tensor &y, const std::optional<Tensor> &source, const Tensor &slots,
          const Tensor &rows, const Tensor &bank, const Tensor &ranks, const Tensor &C,
          const std::optional<Tensor> &offset, const Tensor &starts)
{
    const int64_t tokens = y.size(0);
    const auto *slot = static_cast<const int64_t *>(slots.data_ptr());
    if (std::all_of(slot, slot + tokens, [](int64_t s) { return s < 0; })) return;
    const Tensor &from = source ? *source : y;
    Step<T> work{static_cast<T *>(y.data_ptr()),
                 static_cast<const T *>(from.data_ptr()),
                 slot,
                 static_cast<const int32_t *>(rows.data_ptr()),
                 static_cast<const T *>(bank.data_ptr()),
                 static_cast<const int32_t *>(ranks.data_ptr()),
                 static_cast<const T *>(C.data_ptr()),
                 offset ? static_cast<const T *>(offset->data_ptr()) : nullptr,
                 static_cast<const int64_t *>(starts.data_ptr()),
                 y.stride(0),
                 y.size(1),
                 from.stride(0),
                 bank.stride(0),
                 int(rows.size(0)),
                 int(rows.size(1)),
                 int(bank.size(3))};
    const int64_t each = BLOCK * work.r * (work.out + int64_t(work.n) * work.lanes);
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / each),
                                [&](int64_t first, int64_t last) {
                                    work.run(first * BLOCK, std::min(tokens, last * BLOCK));
                                });
}

void any_step(Tensor y, std::optional<Tensor> source, Tensor slots, Tensor rows, Tensor bank, Tensor ranks, Tensor C,
              std::optional<Tensor> offset, Tensor starts)
{
    switch (y.scalar_type()) {
    case ScalarType::BFloat16: return step<BF16>(y, source, slots, rows, bank, ranks, C, offset, starts);
    case ScalarType::Half: return step<F16>(y, source, slots, rows, bank, ranks, C, offset, starts);
    case ScalarType::Float: return step<float>(y, source, slots, rows, bank, ranks, C, offset, starts);
    default: STD_TORCH_CHECK(false, "secura::step_: dtype must be bfloat16, float16 or float32");
    }
}

}  // namespace

STABLE_TORCH_LIBRARY(secura, m)
{
    m.def("step_(Tensor(a!) y, Tensor? source, Tensor slots, Tensor rows, Tensor bank, "
          "Tensor ranks, Tensor C, Tensor? offset, Tensor starts) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(secura, CPU, m) { m.impl("step_", TORCH_BOX(&any_step)); }
