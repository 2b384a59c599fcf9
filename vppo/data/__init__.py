"""Problems with images: read from files, checked, and brought into the form that TRL trains on."""

from vppo.data.bad_rows import BadRowError
from vppo.data.files import read_file
from vppo.data.options import INSTRUCTION, SYSTEM_PROMPT, DataOptions, RowOptions
from vppo.data.problems import Problem, Problems
from vppo.data.training import load_training_data

__all__ = [
    "INSTRUCTION",
    "SYSTEM_PROMPT",
    "BadRowError",
    "DataOptions",
    "Problem",
    "Problems",
    "RowOptions",
    "load_training_data",
    "read_file",
]
