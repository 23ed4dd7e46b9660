"""Reading activations out of a running model."""

from bsgap_kernels.tracking.tracker import RankTracker, SiteRecord

__all__ = ["RankTracker", "SiteRecord"]
