"""How a question is put to a language model that was published to answer: the text around it, by model.

Control tokens are written by name; `visionllm.words.Words.encode_marked` reads them as such.
"""

from __future__ import annotations

TEMPLATES = {
    # Nothing around it.
    "none": "{}",
    # SmolLM2-Instruct's chat template (Apache-2.0), with its default system message.
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
    # Stanford Alpaca's, for an instruction without input (Taori et al., 2023).
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{}\n\n### Response:"
    ),
}
