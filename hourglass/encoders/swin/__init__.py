from hourglass.encoders.swin.model import Swin
from hourglass.encoders.swin.placed import HourglassSwin

__all__ = ["HourglassSwin", "Swin"]
