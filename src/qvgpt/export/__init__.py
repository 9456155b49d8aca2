"""A guided model, or its values, in the forms that other engines read."""

from qvgpt.export.fidelity import Fidelity
from qvgpt.export.options import ExportOptions
from qvgpt.export.write import export_hf, export_model

__all__ = ["ExportOptions", "Fidelity", "export_hf", "export_model"]
