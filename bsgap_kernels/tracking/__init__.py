"""Reading activations out of a running model."""

from bsgap_kernels.tracking.accumulator import SpectralAccumulator
from bsgap_kernels.tracking.alarms import Alarm
from bsgap_kernels.tracking.distributed import DistributedSpectra
from bsgap_kernels.tracking.history import read
from bsgap_kernels.tracking.records import METRICS, SiteRecord
from bsgap_kernels.tracking.tracker import RankTracker

__all__ = [
    "METRICS",
    "Alarm",
    "DistributedSpectra",
    "RankTracker",
    "SiteRecord",
    "SpectralAccumulator",
    "read",
]
