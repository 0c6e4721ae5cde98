"""The paper's experiments, each one command: ``visionllm reproduce T3b``.

VisionLLM (Wang et al. 2023, arXiv:2305.11175), tables 1 to 4 and figures 6 and 7, beside two questions that
it leaves open: what unmatched queries are taught, and the exponent of a box's score.
"""
