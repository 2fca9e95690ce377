"""How a state's arrays are found, named, taken out and put back.

``survey`` reads a state, ``bind`` puts arrays into a skeleton of it, ``arrays`` and ``rebuild`` make a state that needs
no skeleton, ``meta`` makes skeletons without bytes. torch is imported only where a state or a leaf has a tensor of it.
"""

from __future__ import annotations

from coldstart.frameworks.base import FoundLeaf, Storage, Survey
from coldstart.frameworks.bind import bind
from coldstart.frameworks.meta import meta
from coldstart.frameworks.survey import survey
from coldstart.frameworks.tree import rebuild
from coldstart.frameworks.views import arrays

__all__ = ["FoundLeaf", "Storage", "Survey", "arrays", "bind", "meta", "rebuild", "survey"]
