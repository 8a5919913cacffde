"""From a checkpoint and some images to the fastest plan that keeps what is asked for."""

from hourglass.search.goal import Goal
from hourglass.search.run import Images, Outcome, Search

__all__ = ["Goal", "Images", "Outcome", "Search"]
