import hourglass  # noqa: F401  (mends Detectron2 0.6 before a test imports it)
