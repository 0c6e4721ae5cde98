"""``python -m visionllm.train``: what ``visionllm train`` and torchrun start as training processes."""

from visionllm.train import main
from visionllm.train.launch import end

end(main())
