"""Panels for notebooks: controls, a picture, a sentence. No algorithm lives here."""

from evolq_lite.panels.base import Panel
from evolq_lite.panels.evolution import EvolutionPanel
from evolq_lite.panels.infonce import InfoNCEPanel
from evolq_lite.panels.landscape import LandscapePanel
from evolq_lite.panels.quantizer import QuantizerPanel
from evolq_lite.panels.gallery import GalleryPanel
from evolq_lite.panels.search import SearchPanel
from evolq_lite.panels.vit import ViTPanel

__all__ = [
    "EvolutionPanel",
    "InfoNCEPanel",
    "LandscapePanel",
    "Panel",
    "QuantizerPanel",
    "GalleryPanel",
    "SearchPanel",
    "ViTPanel",
]
