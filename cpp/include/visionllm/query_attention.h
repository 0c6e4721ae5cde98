// Batched query decoding: M groups of S slots attend to one shared prefix and causally to their own group,
// with RoPE of the slots fused (Su et al., "RoFormer", 2021, with the halves of a head rotated against each
// other).
//
//   output[b, m, s, h] = softmax over t of (rope(q)[b, m, s, h] . K_t / sqrt(D)) V_t,  where (K_t, V_t) are
//       the first prefix_length[b] tokens of (prefix_k, prefix_v)[b, :, g] and the slots 0 .. s of group m,
//       (rope(k), v)[b, m, :, g], of KV head g = h / (H / Hkv)
//   logsumexp[b, m, s, h] = log of the sum over t of exp(score), for the backward
//
//   B batch, M groups, S slots of a group (<= 64), H query heads, Hkv KV heads (H is a multiple of it),
//   D channels of a head (a multiple of 8, 8 to 128), P tokens of the prefix (<= 8192, 0 too)
//
//   q                   [B, M, S, H, D]    float32, bfloat16 or float16; not rotated
//   k, v                [B, M, S, Hkv, D]  q's type; k not rotated
//   prefix_k, prefix_v  [B, P, Hkv, D]     q's type; prefix_k rotated already
//   prefix_length       [B]                int64; real tokens stand first, what is behind them is not read
//   cosine, sine        [positions, D / 2] float32, contiguous, positions >= P + S; slot s of a group of b
//                                          has position prefix_length[b] + s. Both absent: no rotation
//   output              [B, M, S, H, D]    q's type, contiguous
//   logsumexp           [B, M, S, H]       float32, contiguous
//
// In q, k, v, prefix_k, prefix_v and grad_output D is contiguous; their other strides are free multiples of
// 16 bytes (0 too), which those of views of one projection of q, k and v are. Every address is a multiple of
// 16 bytes.
//
// Sums and softmax are float32; products of bfloat16 and float16 take rotated q and k and the softmax's
// weights rounded to that type (on the CPU only those of bfloat16 with the prefix, on avx512_bf16, do: all
// others are products of float32). Results are deterministic and do not depend on the number of threads. A
// prefix_length outside 0 .. P is clamped (checking it would mean waiting for a CUDA device). On CUDA
// infinities or NaN in v of one group may reach the slots of groups near it.
//
// On the CPU nothing goes to a vendor's library. torch's products of scores and of outputs alone (MKL, oneDNN)
// took as long as this operator as a whole with rotation, softmax and own groups, or longer once the softmax is
// added: on one core of an AMD EPYC (Zen 4), 64 groups of 5 slots, 6 heads over 3, D = 32, 400 tokens: float32
// 1.13 + 0.45 ms against 1.15, bfloat16 0.50 + 0.59 against 0.73; 100 groups of 5, 32 heads, D = 128, 300 tokens:
// 33.4 + 3.1 against 31.5, bfloat16 13.8 + 4.8 against 18.2.
#pragma once

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

// Into how many parts the keys should be divided among CUDA blocks (on the CPU they are not divided). 1 means one pass and no workspace; more,
// only for prefixes above 2048 with few rows, needs a second, small launch that merges the parts.
int query_attention_splits(std::int64_t B, std::int64_t M, std::int64_t S, std::int64_t H, std::int64_t Hkv,
                           std::int64_t P);

// workspace: absent (one pass), or float32 [splits, B * M * S * H * (D + 1)], contiguous; its first size says
// how many splits are made. Not used on the CPU, whose threads have memory of their own for the call.
Status query_attention(const TensorView& output, const TensorView& logsumexp, const TensorView& workspace,
                       const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView& prefix_k, const TensorView& prefix_v,
                       const TensorView& prefix_length, const TensorView& cosine, const TensorView& sine,
                       const Execution& execution);

// Gradients of a scalar loss with respect to q and k before rotation, v, prefix_k and prefix_v; every
// element is written (not added to), with zeros behind prefix_length. They are contiguous and have their
// input's shape and type. output and logsumexp are the forward's; workspace is float32 [B, M, S, H],
// contiguous (not used on the CPU).
Status query_attention_backward(const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v,
                                const TensorView& grad_prefix_k, const TensorView& grad_prefix_v,
                                const TensorView& workspace, const TensorView& grad_output,
                                const TensorView& output, const TensorView& logsumexp, const TensorView& q,
                                const TensorView& k, const TensorView& v, const TensorView& prefix_k,
                                const TensorView& prefix_v, const TensorView& prefix_length,
                                const TensorView& cosine, const TensorView& sine, const Execution& execution);

}  // namespace visionllm
