"""Nuclei in microscopy (BBBC038): the data set in COCO's layout, and pictures of what fewer tokens do to it."""

from projects.nuclei.dataset import register_nuclei

__all__ = ["register_nuclei"]
