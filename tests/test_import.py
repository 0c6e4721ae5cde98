"""``import visionllm`` is quick and does no work."""

from __future__ import annotations

import subprocess
import sys

import pytest

import visionllm

SCRIPT = """
import sys, time
start = time.perf_counter()
import visionllm
elapsed = time.perf_counter() - start
assert visionllm.__version__
heavy = {"torch", "numpy", "PIL", "scipy", "matplotlib", "sentencepiece", "pycocotools"} & set(sys.modules)
assert not heavy, f"imported at once: {heavy}"
assert not [name for name in sys.modules if name.startswith("visionllm.")]
print(elapsed)
"""


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_import_takes_less_than_half_a_second_and_no_torch():
    # The best of three: another process may hold the processor.
    assert min(float(run(SCRIPT)) for _ in range(3)) < 0.5


def test_commands_that_need_no_torch_do_not_import_it():
    script = "import sys\nfrom visionllm.cli import main\nassert main(['instruction', {text!r}]) == 0\n"
    script += "assert 'torch' not in sys.modules"
    assert run(script.format(text='Detect {"dog": <c0>} in <image>.'))


@pytest.mark.parametrize("name", visionllm.__all__)
def test_public_names_are_there(name):
    assert getattr(visionllm, name) is not None
    assert name in dir(visionllm)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'visionllm' has no attribute 'laod'"):
        visionllm.laod  # noqa: B018
