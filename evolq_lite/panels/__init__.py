"""Panels for notebooks: controls, a picture, a sentence; and questions. No algorithm lives here."""

from evolq_lite.panels.base import Panel
from evolq_lite.panels.block import BlockPanel
from evolq_lite.panels.evolution import EvolutionPanel
from evolq_lite.panels.gallery import GalleryPanel
from evolq_lite.panels.infonce import InfoNCEPanel
from evolq_lite.panels.landscape import LandscapePanel
from evolq_lite.panels.quantizer import QuantizerPanel
from evolq_lite.panels.quiz import Guess, Quiz
from evolq_lite.panels.race import RacePanel
from evolq_lite.panels.reading import ReadingPanel
from evolq_lite.panels.rounding import RoundingPanel
from evolq_lite.panels.search import SearchPanel
from evolq_lite.panels.vit import ViTPanel

__all__ = [
    "BlockPanel",
    "EvolutionPanel",
    "GalleryPanel",
    "Guess",
    "InfoNCEPanel",
    "LandscapePanel",
    "Panel",
    "QuantizerPanel",
    "Quiz",
    "RacePanel",
    "ReadingPanel",
    "RoundingPanel",
    "SearchPanel",
    "ViTPanel",
]
