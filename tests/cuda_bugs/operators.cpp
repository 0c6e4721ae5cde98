// The functions of bugs.cu and operations.cu that tests/test_cuda_emulation.py calls.
#include "emulation/operators.h"

#define VISIONLLM_BUG(name)                                                                               \
  namespace visionllm {                                                                                   \
  Status name(const TensorView& output, const TensorView& workspace, const TensorView& input, bool fixed, \
              const Execution& execution);                                                                \
  }                                                                                                       \
  VISIONLLM_OPERATOR(name, ">output ~workspace input")

VISIONLLM_BUG(shared_overrun)
VISIONLLM_BUG(dynamic_overrun)
VISIONLLM_BUG(uninitialised_shared)
VISIONLLM_BUG(missing_barrier)
VISIONLLM_BUG(missing_barrier_in_loop)
VISIONLLM_BUG(missing_warp_barrier)
VISIONLLM_BUG(barrier_of_half_warp)
VISIONLLM_BUG(shared_atomics)
VISIONLLM_BUG(return_before_barrier)
VISIONLLM_BUG(two_barriers)
VISIONLLM_BUG(barrier_against_warp_barrier)
VISIONLLM_BUG(shuffle_in_branch)
VISIONLLM_BUG(shuffles_in_two_branches)
VISIONLLM_BUG(shuffle_from_missing_lane)
VISIONLLM_BUG(vote_without_own_lane)
VISIONLLM_BUG(returned_lane)
VISIONLLM_BUG(read_out_of_bounds)
VISIONLLM_BUG(write_out_of_bounds)
VISIONLLM_BUG(misaligned)
VISIONLLM_BUG(write_to_input)
VISIONLLM_BUG(unwritten_output)
VISIONLLM_BUG(uninitialised_output)
VISIONLLM_BUG(uninitialised_workspace)
VISIONLLM_BUG(sum_over_blocks)
VISIONLLM_BUG(two_threads_one_element)
VISIONLLM_BUG(last_block)
VISIONLLM_BUG(order_of_blocks)
VISIONLLM_BUG(misaligned_matrix)
VISIONLLM_BUG(integer_overflow)
VISIONLLM_BUG(register_array_overrun)
VISIONLLM_BUG(stack_overflow)
VISIONLLM_BUG(too_many_threads)
VISIONLLM_BUG(empty_grid)
VISIONLLM_BUG(too_much_shared_memory)
VISIONLLM_BUG(host_reads_device_memory)
VISIONLLM_BUG(copy_no_wait)
VISIONLLM_BUG(copy_wait_for_too_few)
VISIONLLM_BUG(copy_no_barrier)
VISIONLLM_BUG(copy_refill)
VISIONLLM_BUG(copy_misaligned)

namespace visionllm {
Status shuffles(const TensorView& output, const TensorView& input, std::int64_t amount, std::int64_t width,
                const Execution& execution);
Status votes(const TensorView& output, const TensorView& input, const Execution& execution);
Status numbers(const TensorView& output, const Execution& execution);
Status atomics(const TensorView& output, const TensorView& half_pair, const TensorView& bfloat16_pair,
               const TensorView& integers, const TensorView& wide, const Execution& execution);
Status product(const TensorView& d, const TensorView& a, const TensorView& b, const TensorView& c,
               const Execution& execution);
Status product_from_shared(const TensorView& d, const TensorView& a, const TensorView& b,
                           const TensorView& bt, const Execution& execution);
Status convert(const TensorView& output, const TensorView& back, const TensorView& input,
               const Execution& execution);
Status copies(const TensorView& output, const TensorView& input, const Execution& execution);
}  // namespace visionllm

VISIONLLM_OPERATOR(shuffles, ">output input")
VISIONLLM_OPERATOR(votes, ">output input")
VISIONLLM_OPERATOR(numbers, ">output")
VISIONLLM_OPERATOR(atomics, "&output &half_pair &bfloat16_pair &integers &wide")
VISIONLLM_OPERATOR(product, ">d a b c")
VISIONLLM_OPERATOR(product_from_shared, ">d a b bt")
VISIONLLM_OPERATOR(convert, ">output >back input")
VISIONLLM_OPERATOR(copies, ">output input")
