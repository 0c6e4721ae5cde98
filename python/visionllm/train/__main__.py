"""``python -m visionllm.train``: what ``visionllm train`` and torchrun start as training processes."""

import sys

from visionllm.train import main

sys.exit(main())
