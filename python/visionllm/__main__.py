"""``python -m visionllm``: the same as the command ``visionllm``."""

from visionllm.cli import main

raise SystemExit(main())
