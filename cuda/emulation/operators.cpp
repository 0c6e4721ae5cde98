// The operators that tests can run under emulation. Each operator's lines are compiled into a driver of its own,
// which is built from cuda/<op>*.cu and cpp/<op>.cpp.
//
// A function's tensors are named in the order of its parameters: >output ~workspace &updated input
// @input-in-host-memory.
#include "emulation/operators.h"

#ifdef VISIONLLM_EMULATE_ms_deform_attn
#include "visionllm/ms_deform_attn.h"
VISIONLLM_OPERATOR(ms_deform_attn,
                   ">output value spatial_shapes level_start_index sampling_locations attention_weights")
VISIONLLM_OPERATOR(
    ms_deform_attn_backward,
    ">grad_value >grad_sampling_locations >grad_attention_weights grad_output value spatial_shapes "
    "level_start_index sampling_locations attention_weights")
#endif

#ifdef VISIONLLM_EMULATE_lora_linear
#include "visionllm/lora_linear.h"
#endif

#ifdef VISIONLLM_EMULATE_fusion_attention
#include "visionllm/fusion_attention.h"
VISIONLLM_OPERATOR(
    fusion_attention,
    ">output x norm_weight norm_bias query_weight query_bias key value mask output_weight output_bias "
    "gate")
VISIONLLM_OPERATOR(
    fusion_attention_backward,
    ">grad_x >grad_norm_weight >grad_norm_bias >grad_query_weight >grad_query_bias >grad_key "
    ">grad_value >grad_output_weight >grad_output_bias >grad_gate ~workspace grad_output x norm_weight "
    "norm_bias query_weight query_bias key value mask output_weight output_bias gate")
#endif

#ifdef VISIONLLM_EMULATE_query_attention
#include "visionllm/query_attention.h"
VISIONLLM_OPERATOR(query_attention,
                   ">output >logsumexp ~workspace q k v prefix_k prefix_v prefix_length cosine sine")
VISIONLLM_OPERATOR(
    query_attention_backward,
    ">grad_q >grad_k >grad_v >grad_prefix_k >grad_prefix_v ~workspace grad_output output logsumexp "
    "q k v prefix_k prefix_v prefix_length cosine sine")
#endif

#ifdef VISIONLLM_EMULATE_slot_head
#include "visionllm/slot_head.h"
#endif
