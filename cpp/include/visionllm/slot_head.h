// The head that reads slots: each slot's state is compared with the rows that its kind may take (VisionLLM,
// Wang et al., NeurIPS 2023, 3.3: class tokens, location tokens), never with a whole vocabulary.
//
//   normed[b, g, s, :]    = states[b, g, s, :] / sqrt(mean(states[b, g, s, :]^2) + epsilon) * norm_weight
//                           rounded to states' type; without norm_weight: states
//   logits[b, g, s, v]    = scale * normed[b, g, s, :] . rows[b, v, :]      -inf where valid[b, v] is 0
//   logsumexp             = log(sum over v of exp(logits))
//   best                  = argmax over v of logits, the first of equals; -1 where logsumexp is not finite
//   probability           = exp(logits[best] - logsumexp); NaN where best is -1
//   expectation           = mean of (v - offset) over |v - best| <= window, weighted with exp(logits); NaN
//                           where best is -1
//   probabilities[.., v]  = exp(logits - logsumexp); NaN where best is -1
//
// Cross-entropy against a row (target int64) or against a Gaussian over the rows (target float32):
//
//   exponents[b, g, s, v] = 0 at v == target, else -inf;  or  -(v - target)^2 / (2 sigma^2) with the target
//                           moved into [0, V - 1] and -inf where valid[b, v] is 0
//   target_logsumexp      = log(sum over v of exp(exponents))
//   loss                  = weight * sum over v of exp(exponents - target_logsumexp) (logsumexp - logits)
//
// A slot whose int64 target is negative, or whose weight is 0, is ignored: its loss is 0 and it adds to no
// gradient, whatever its state holds. A wanted row that is not allowed costs +inf, one beyond the rows NaN.
// What rows hold where they are not allowed, NaN too, is not used.
//
// Shape letters: B pictures, G groups, S slots of this kind in a group, C channels, V rows, R row sets: B, or
//   1 for all pictures
//
//   states            [B, G, S, C]  float32, bfloat16 or float16; C contiguous, other strides are free (0 too):
//                                   a view of the slots of one kind needs no copy
//   rows              [R, V, C]     states' type, or int8 with row_scale; strides as states'; V at least 1
//   row_scale         [R, V]        float32: row v is row_scale[v] * rows[v]; V contiguous
//   valid             [B, V]        uint8 or boolean, not 0 where a row is allowed; V contiguous; or absent
//   norm_weight       [C]           states' type; contiguous; or absent
//   target            [B, G, S]     int64 or float32; contiguous
//   weight            [B, G, S]     float32; contiguous; or absent: 1
//   best              [B, G, S]     int64; contiguous, as the outputs below
//   probability, logsumexp, target_logsumexp, loss    [B, G, S]  float32
//   expectation       [B, G, S]     float32, or absent: not wanted
//   probabilities     [B, G, S, V]  float32, or absent: not wanted
//
// Accumulation is in float32, in an order that depends on the sizes only: forward and backward are
// deterministic, on the CPU whatever the number of threads. Logits are never written as a whole, but for what
// is asked for in `probabilities`: a block of up to 256 slots at a time, in the cache. The backward holds the
// logits' gradient of `slots_at_once` slots at a time, in states' type.
//
// CUDA: addresses are multiples of 16 bytes and so are strides in bytes, C is a multiple of 8, V at most 65536,
// window at most 31, and rows have states' type.
//
// CPU: V is at most 2^24. The workspace is not used and may be absent: each thread has its own, allocated here.
// Nothing goes to another library. On one core of an AMD EPYC with AVX-512 and bfloat16 dot products, norm, product
// and argmax of 500 slots against 1537 rows at C = 4096: 70 ms in float32 (torch, whose product is MKL's: 106) and
// 34 ms in bfloat16 (torch with oneDNN: 36).
#pragma once

#include <cstdint>

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

constexpr std::int64_t kSlotHeadMaxRows = 65536;
constexpr std::int64_t kSlotHeadMaxRowsOnCpu = std::int64_t{1} << 24;
constexpr std::int64_t kSlotHeadMaxWindow = 31;

enum class SlotHeadCall : std::int32_t { predict = 0, cross_entropy = 1, backward = 2 };

// Bytes of workspace that a call needs on CUDA, whatever the GPU; -1 for sizes that no call takes. `shared`: R is
// 1; `masked`: valid is there; `normed`: norm_weight is there; `window` is -1 where no expectation is wanted;
// `slots_at_once` is the backward's.
std::int64_t slot_head_workspace_bytes(SlotHeadCall call, std::int64_t B, std::int64_t G, std::int64_t S,
                                       std::int64_t C, std::int64_t V, std::int64_t element_bytes,
                                       bool shared, bool masked, bool normed, std::int64_t window,
                                       std::int64_t slots_at_once);

// `workspace` is float32 [W], at least as many bytes as the function above says, of any content; its content
// afterwards means nothing. `window` is at least 0; it is not read where expectation is absent.
Status slot_head_predict(const TensorView& best, const TensorView& probability, const TensorView& logsumexp,
                         const TensorView& expectation, const TensorView& probabilities,
                         const TensorView& workspace, const TensorView& states, const TensorView& rows,
                         const TensorView& valid, const TensorView& norm_weight, double epsilon, double scale,
                         std::int64_t window, double offset, const Execution& execution);

// `sigma` is read for float32 targets and must be above 0 then.
Status slot_head_cross_entropy(const TensorView& loss, const TensorView& logsumexp,
                               const TensorView& target_logsumexp, const TensorView& workspace,
                               const TensorView& states, const TensorView& rows, const TensorView& target,
                               const TensorView& weight, const TensorView& valid,
                               const TensorView& norm_weight, double epsilon, double scale, double sigma,
                               const Execution& execution);

// Gradients of a scalar loss; every output element is written (not added to). They are contiguous and have
// their input's shape and type; grad_norm_weight is there exactly when norm_weight is. grad_loss is float32
// [B, G, S], contiguous; logsumexp and target_logsumexp are the forward's. `slots_at_once`: slots that meet the
// same rows and are held at a time, rounded up to a multiple of 128; 0: as many as take 2^25 elements, at least
// 128.
Status slot_head_cross_entropy_backward(const TensorView& grad_states, const TensorView& grad_rows,
                                        const TensorView& grad_norm_weight, const TensorView& workspace,
                                        const TensorView& grad_loss, const TensorView& states,
                                        const TensorView& rows, const TensorView& target,
                                        const TensorView& weight, const TensorView& valid,
                                        const TensorView& norm_weight, const TensorView& logsumexp,
                                        const TensorView& target_logsumexp, double epsilon, double scale,
                                        double sigma, std::int64_t slots_at_once, const Execution& execution);

// The same with int8 rows and row_scale, on the CPU only. These rows are frozen: they have no gradient.
Status slot_head_predict_int8(const TensorView& best, const TensorView& probability,
                              const TensorView& logsumexp, const TensorView& expectation,
                              const TensorView& probabilities, const TensorView& states,
                              const TensorView& rows, const TensorView& row_scale, const TensorView& valid,
                              const TensorView& norm_weight, double epsilon, double scale,
                              std::int64_t window, double offset, const Execution& execution);

Status slot_head_cross_entropy_int8(const TensorView& loss, const TensorView& logsumexp,
                                    const TensorView& target_logsumexp, const TensorView& states,
                                    const TensorView& rows, const TensorView& row_scale,
                                    const TensorView& target, const TensorView& weight,
                                    const TensorView& valid, const TensorView& norm_weight, double epsilon,
                                    double scale, double sigma, const Execution& execution);

Status slot_head_cross_entropy_int8_backward(
    const TensorView& grad_states, const TensorView& grad_norm_weight, const TensorView& grad_loss,
    const TensorView& states, const TensorView& rows, const TensorView& row_scale, const TensorView& target,
    const TensorView& weight, const TensorView& valid, const TensorView& norm_weight,
    const TensorView& logsumexp, const TensorView& target_logsumexp, double epsilon, double scale,
    double sigma, std::int64_t slots_at_once, const Execution& execution);

// The forward, and the gradients of the sum of `loss` over all slots, on the CPU only: three products where the
// two calls above take four, for the logits are not computed again.
Status slot_head_cross_entropy_sum(const TensorView& loss, const TensorView& logsumexp,
                                   const TensorView& target_logsumexp, const TensorView& grad_states,
                                   const TensorView& grad_rows, const TensorView& grad_norm_weight,
                                   const TensorView& states, const TensorView& rows, const TensorView& target,
                                   const TensorView& weight, const TensorView& valid,
                                   const TensorView& norm_weight, double epsilon, double scale, double sigma,
                                   std::int64_t slots_at_once, const Execution& execution);

}  // namespace visionllm
