"""From a checkpoint and some images to the fastest plan that keeps what is asked for."""

from hourglass.search.goal import Goal
from hourglass.search.run import Found, Images, Search

__all__ = ["Found", "Goal", "Images", "Search"]
