"""Uses a trained network on audio of any length: features, tags, tags over time, events. Training never opens this."""

from asda.data.audio.arrays import File
from asda.inference.model import Device, Model, load, mean_logits
from asda.inference.results import Features, Tag, Timeline
from asda.inference.stream import Stream

__all__ = ["Device", "Features", "File", "Model", "Stream", "Tag", "Timeline", "load", "mean_logits"]
