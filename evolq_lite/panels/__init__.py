"""Panels for notebooks: controls, a picture, a sentence. No algorithm lives here."""

from evolq_lite.panels.base import Panel
from evolq_lite.panels.quantizer import QuantizerPanel

__all__ = ["Panel", "QuantizerPanel"]
