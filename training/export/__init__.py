"""A run's student as a folder that other libraries load: a module per format, compared after it was loaded back."""

from training.export.comparison import largest_difference
from training.export.config import ExportConfig
from training.export.stage import export

__all__ = ["ExportConfig", "export", "largest_difference"]
