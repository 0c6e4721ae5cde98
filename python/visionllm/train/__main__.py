import sys

from visionllm.train import main

sys.exit(main())
