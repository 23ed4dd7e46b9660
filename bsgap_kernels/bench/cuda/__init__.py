"""`bsgap bench --device cuda`: ours and their peers on a GPU, with floors measured in the same run.

Everything runs on the CPU too (`run(config, device="cpu")`), which is how it is tested: the clock then reads
the host's time, and graphs, kernel lists and the driver are left out.
"""

from .cases import GPU_CASES
from .run import SCHEMA, run

__all__ = ["GPU_CASES", "SCHEMA", "run"]
